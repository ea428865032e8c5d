"""The numpy cluster unit passes pi2rt's conformance suite."""

from numpy_cluster_unit.unit import NumpyUnit

from pi2rt.testing import ClusterUnitConformance


class TestNumpyUnit(ClusterUnitConformance):
    def make_unit(self) -> NumpyUnit:
        return NumpyUnit()

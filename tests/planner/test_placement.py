from __future__ import annotations

import pytest

from pi2rt._errors import RequestError
from pi2rt.host.topology import CoreClass, Topology, parse_core_classes
from pi2rt.planner.placement import PlacedActor, UnitPlacement, default_placement

PHONE = Topology(
    (CoreClass("prime", (7,)), CoreClass("big", (2, 3, 4, 5, 6), 870), CoreClass("little", (0, 1), 325))
)
LAPTOP = Topology((CoreClass("big", (0, 2), siblings=(1, 3)), CoreClass("little", (4, 5), 600)))


def test_every_class_gets_an_actor_and_the_best_leads() -> None:
    placement = default_placement(PHONE)
    assert placement == UnitPlacement(
        (
            PlacedActor("prime", (7,), True),
            PlacedActor("big", (2, 3, 4, 5, 6), False),
            PlacedActor("little", (0, 1), False),
        )
    )
    assert placement.lead.name == "prime"
    assert placement.assistants == (("big", (2, 3, 4, 5, 6)), ("little", (0, 1)))
    assert placement.threads == 8


@pytest.mark.parametrize(
    ("threads", "expected"),
    [
        (None, {"big": (0, 2), "little": (4, 5)}),
        (1, {"big": (0,)}),
        (3, {"big": (0, 2), "little": (4,)}),
        (5, {"big": (0, 2, 1), "little": (4, 5)}),
        (6, {"big": (0, 2, 1, 3), "little": (4, 5)}),
    ],
)
def test_threads_best_cores_first_and_second_threads_last(
    threads: int | None, expected: dict[str, tuple[int, ...]]
) -> None:
    placement = default_placement(LAPTOP, threads)
    assert {actor.name: actor.cores for actor in placement.actors} == expected
    assert [actor.lead for actor in placement.actors] == [True] + [False] * (len(expected) - 1)


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.0, 1), (2.9, 2), (3.0, 3), (64.0, 4), (None, 4)])
def test_quota(quota: float | None, threads: int) -> None:
    assert default_placement(Topology(LAPTOP.classes, quota)).threads == threads


def test_what_the_user_asks_for_goes_over_the_quota() -> None:
    topology = Topology(LAPTOP.classes, 1.0)
    assert default_placement(topology, 4).threads == 4
    assert default_placement(topology, None, parse_core_classes(["a=0", "b=2"], LAPTOP)).threads == 2


def test_own_classes() -> None:
    cores = parse_core_classes(["little=4", "big=0,1"], LAPTOP)
    placement = default_placement(LAPTOP, None, cores)
    assert placement.actors == (PlacedActor("little", (4,), True), PlacedActor("big", (0, 1), False))
    assert default_placement(LAPTOP, 2, cores).assistants == (("big", (0,)),)


def test_too_many_threads() -> None:
    with pytest.raises(RequestError, match="threads=7: this process may use only 6 hardware threads"):
        default_placement(LAPTOP, 7)
    with pytest.raises(RequestError, match="threads=3: the cores chosen give only 2"):
        default_placement(LAPTOP, 3, parse_core_classes(["a=0,2"], LAPTOP))
    with pytest.raises(RequestError, match="threads=0: at least one is needed"):
        default_placement(LAPTOP, 0)

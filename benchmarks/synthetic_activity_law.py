"""How often the neurons of a feed-forward block are active, and what follows from it."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from synthetic_shape import FeedForwardActivation

Doubles = npt.NDArray[np.float64]

HOTTEST, COLDEST = 0.98, 0.001
"""Probabilities with which the first and the last neuron are active."""
LOWEST, HIGHEST = 0.005, 0.45
"""Mean activities that a power law between them can have."""
_EXPONENT = 1.0  # at a mean of 0.1, 30 % of the neurons then make 80 % of the activations

_NORMAL = NormalDist()


def firing_probabilities(neurons: int, activity: float) -> Doubles:
    """Probabilities of a power law with an offset, falling, float64 (neurons,): over the rank x in (0, 1),
    ``(x + x0) ** -1`` less its value at 1, scaled to reach from ``HOTTEST`` to ``COLDEST``; ``x0`` makes the mean.

    PowerInfer (Song et al., 2024) measured that 26 % (OPT-30B) to 43 % (ReGLU Llama 2 70B) of the neurons of one block
    make 80 % of its activations.

    Raises:
        ValueError: ``activity``, the mean, is not between ``LOWEST`` and ``HIGHEST``.
    """
    if not LOWEST <= activity <= HIGHEST:
        raise ValueError(f"an activity of {activity:g} is not between {LOWEST:g} and {HIGHEST:g}")
    ranks = (np.arange(neurons) + 0.5) / neurons

    def law(offset: float) -> Doubles:
        end = (1 + offset) ** -_EXPONENT
        fall: Doubles = ((ranks + offset) ** -_EXPONENT - end) / (offset**-_EXPONENT - end)
        return COLDEST + (HOTTEST - COLDEST) * fall

    low, high = 1e-6, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if law(middle).mean() > activity else (middle, high)
    return law(high)


def biases(probabilities: Doubles) -> Doubles:
    """What must be added to a standard normal variable to be positive with these probabilities."""
    return np.array([_NORMAL.inv_cdf(p) for p in probabilities])


def hidden_energy(activation: FeedForwardActivation, bias: Doubles) -> float:
    """Mean square of ``activation(gate) * up`` over neurons whose gates are standard normal plus ``bias``, and whose
    ups are standard normal."""
    if activation == "silu":
        z = np.linspace(-8, 8, 4001)
        weight = np.exp(-(z**2) / 2) / np.sum(np.exp(-(z**2) / 2))
        energies = {b: np.sum(weight * np.square((z + b) / (1 + np.exp(-z - b)))) for b in np.unique(bias)}
        return float(np.mean([energies[b] for b in bias]))
    above = np.array([_NORMAL.cdf(b) for b in bias])
    density = np.array([_NORMAL.pdf(b) for b in bias])
    gate_energy = float(np.mean((1 + bias**2) * above + bias * density))
    return gate_energy / 2 if activation == "drelu" else gate_energy

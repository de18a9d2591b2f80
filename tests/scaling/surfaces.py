"""Chinchilla's surface and a grid of runs on it."""

from __future__ import annotations

import itertools
import math

import numpy as np

from scfm_jax.scaling.law import Law, LawConfig

SIZES, DATA = np.geomspace(1e6, 1e10, 6), np.geomspace(1e8, 3e11, 5)
FEW = LawConfig(draws=100)
# Of Chinchilla's surface.
ALPHA, BETA, A, B = 0.34, 0.28, 406.4, 410.7


def grid(ks: tuple[int, ...] = (0,)) -> list[tuple[float, float, int]]:
    return [(float(n), float(d), k) for n, d, k in itertools.product(SIZES, DATA, ks)]


def with_neighbours(size: float, data: float, k: int) -> float:
    return 1.69 + A / size**ALPHA + B / data**BETA - 0.06 * math.log2(1 + k)


def value(law: Law, name: str) -> float:
    found = next(parameter for parameter in law.parameters if parameter.name == name)
    assert found.value is not None, found.why
    return found.value

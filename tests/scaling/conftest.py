"""Studies of known surfaces: runs whose loss is a law of ours, and noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from surfaces import ALPHA, BETA, FEW, A, B, grid, with_neighbours

from scfm_jax.scaling.law import Law, fit_law
from scfm_jax.scaling.runs import runs_of

Row = dict[str, Any]
Surface = Callable[[float, float, int], float]


def chinchilla(size: float, data: float, k: int = 0) -> float:
    """Hoffmann et al. (2022), approach 3."""
    return 1.69 + A / size**ALPHA + B / data**BETA


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Row]]:
    def make_rows(
        points: Iterable[tuple[float, float, int]],
        loss: Surface = chinchilla,
        *,
        noise: float = 0.0,
        seed: int = 0,
        seeds: int = 1,
        epochs: float = 1.0,
    ) -> list[Row]:
        """Runs at (N, D, k), whose FLOPs are 6 N D times the cells of a sample."""
        rng = np.random.default_rng(seed)
        rows = []
        for number, (size, data, k) in enumerate(points):
            for repeat in range(seeds):
                rows.append(
                    {
                        "name": f"run-{number}-{repeat}",
                        "family": "tissue",
                        "seed": repeat,
                        "k": k,
                        "parameters": size + 1e5,
                        "parameters_without_embeddings": size,
                        "cells": data,
                        "tokens": data * 100 * (k + 1),
                        "unique_cells": data / epochs,
                        "epochs": epochs,
                        "flops": 6 * size * data * (k + 1),
                        "loss": loss(size, data, k) + noise * rng.normal(),
                        "loss_se": 0.01,
                    }
                )
        return rows

    return make_rows


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[Iterable[Row]], Path]:
    def write_rows(rows: Iterable[Row], name: str = "runs.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write_rows


@pytest.fixture(scope="session")
def law(make_rows: Callable[..., list[Row]]) -> Law:
    """Three k, two seeds."""
    rows = make_rows(grid((0, 4, 16)), with_neighbours, noise=0.004, seeds=2)
    return fit_law(runs_of(rows, "runs"), FEW)

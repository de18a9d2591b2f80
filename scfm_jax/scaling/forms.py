"""Forms of the law that gives the held-out loss from size N, data D and neighbours k.

Every form is a sum of terms that are linear in the coefficients and non-linear in few exponents; at each k it
is E + A / N^alpha + B / D^beta with that k's own E, A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

# Of every exponent and of k0, the least and the greatest that is looked at.
BOUNDS = {"alpha": (0.02, 2.0), "beta": (0.02, 2.0), "gamma": (0.1, 4.0), "k0": (0.25, 64.0)}


_SAME = 0.01  # a share of N or D, within which it is one level


def binned(values: Float64[np.ndarray, " n"], share: float = _SAME) -> Int64[np.ndarray, " n"]:
    """A number for each level, upwards: values that exceed a level's least by no more than `share`."""
    found = np.zeros(len(values), np.int64)
    number, least = 0, values.min(initial=np.inf)
    for place in np.argsort(values):
        if values[place] > least * (1 + share):
            number, least = number + 1, values[place]
        found[place] = number
    return found


def levels(values: Float64[np.ndarray, " n"]) -> int:
    """How many levels of N or D there are, those within a hundredth of each other counted once."""
    return int(binned(values).max()) + 1


class Term(NamedTuple):
    """A coefficient and what it multiplies: N^-alpha, D^-beta, (k + k0)^-gamma, or a product of them.

    `level` is the k that it is for alone; None for all.
    """

    name: str
    level: int | None = None
    size: bool = False
    data: bool = False
    neighbours: bool = False


@dataclass(frozen=True)
class Design:
    """What was measured: the coordinates of every run.

    Attributes
    ----------
    size, data
        N and D.
    k
        Neighbours.
    """

    size: Float64[np.ndarray, " n"]
    data: Float64[np.ndarray, " n"]
    k: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.size)

    @property
    def levels(self) -> tuple[int, ...]:
        """Every k that occurs."""
        return tuple(int(k) for k in np.unique(self.k))

    @property
    def configurations(self) -> Int64[np.ndarray, " n"]:
        """A number for each (N, D, k): runs that differ by their seed alone share it.

        So do those whose N and D are within a hundredth: seeds may draw other blocks of cells.
        """
        all_three = np.stack([binned(self.size), binned(self.data), self.k], axis=1)
        return np.unique(all_three, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def take(self, places: np.ndarray) -> Design:
        return Design(self.size[places], self.data[places], self.k[places])


@dataclass(frozen=True)
class Form:
    """Terms, and the exponents that they hold.

    Attributes
    ----------
    name
        A key of `FORMS`.
    equation
        For a reader.
    terms
        Coefficients, none below zero.
    exponents
        Of ``alpha``, ``beta``, ``gamma`` and ``k0``; searched by their logarithms.
    """

    name: str
    equation: str
    terms: tuple[Term, ...]
    exponents: tuple[str, ...]

    @property
    def n_parameters(self) -> int:
        return len(self.terms) + len(self.exponents)

    @property
    def names(self) -> tuple[str, ...]:
        """Exponents, then coefficients: the order of every array of parameters."""
        return (*self.exponents, *(term.name for term in self.terms))

    @property
    def bounds(self) -> Float64[np.ndarray, "2 q"]:
        """Logarithms of the least and the greatest exponents."""
        return np.log([BOUNDS[name] for name in self.exponents]).reshape(-1, 2).T

    def grid(self, points: int) -> Float64[np.ndarray, "g q"]:
        """Logarithms of exponents on a grid of about so many points."""
        low, high = self.bounds
        each = max(3, round(points ** (1 / max(len(low), 1))))
        axes = [np.linspace(a, b, each) for a, b in zip(low, high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low))

    def columns(self, design: Design, theta: Float64[np.ndarray, "b q"]) -> Float64[np.ndarray, "b n p"]:
        """What each coefficient multiplies, for exponents of logarithm `theta`."""
        value = dict(zip(self.exponents, np.exp(theta).T[..., None], strict=True))
        log_size, log_data, log_k = np.log(design.size), np.log(design.data), None
        if "gamma" in value:
            log_k = np.log(design.k + value["k0"])
        ones = np.ones((len(theta), len(design)))
        factors = {
            "size": np.exp(-value["alpha"] * log_size) if "alpha" in value else ones,
            "data": np.exp(-value["beta"] * log_data) if "beta" in value else ones,
            "neighbours": np.exp(-value["gamma"] * log_k) if log_k is not None else ones,
        }
        columns = np.empty((len(theta), len(design), len(self.terms)))
        for place, term in enumerate(self.terms):
            column = ones if term.level is None else ones * (design.k == term.level)
            for part in ("size", "data", "neighbours"):
                if getattr(term, part):
                    column = column * factors[part]
            columns[..., place] = column
        return columns

    def slopes(
        self,
        design: Design,
        theta: Float64[np.ndarray, "b q"],
        parts: Float64[np.ndarray, "b n p"],
    ) -> Float64[np.ndarray, "b n q"]:
        """Derivatives of the loss by `theta`, from the terms' values `parts`."""
        value = dict(zip(self.exponents, np.exp(theta).T[..., None], strict=True))

        def together(part: str) -> Float64[np.ndarray, "b n"]:
            return parts[..., [getattr(term, part) for term in self.terms]].sum(-1)

        found = []
        for name in self.exponents:
            if name == "alpha":
                slope = -value[name] * np.log(design.size) * together("size")
            elif name == "beta":
                slope = -value[name] * np.log(design.data) * together("data")
            elif name == "gamma":
                slope = -value[name] * np.log(design.k + value["k0"]) * together("neighbours")
            else:
                slope = -value["gamma"] * value["k0"] / (design.k + value["k0"]) * together("neighbours")
            found.append(slope)
        return np.stack(found, axis=-1) if found else np.zeros((*parts.shape[:2], 0))

    def at(self, k: int, parameters: Float64[np.ndarray, "b p"]) -> Float64[np.ndarray, "b 3"]:
        """E, A and B at `k`, which is one of the form's levels where it has any."""
        one = Design(np.ones(1), np.ones(1), np.array([k]))
        q = len(self.exponents)
        with np.errstate(divide="ignore"):
            parts = self.columns(one, np.log(parameters[:, :q]))[:, 0] * parameters[:, q:]
        kinds = [0 if not (t.size or t.data) else 1 if t.size else 2 for t in self.terms]
        return np.stack([parts[:, [kind == at for kind in kinds]].sum(1) for at in range(3)], axis=1)


def predict(form: Form, design: Design, parameters: Float64[np.ndarray, "b p"]) -> Float64[np.ndarray, "b n"]:
    """Loss at every point of the design, for each row of parameters."""
    q = len(form.exponents)
    return np.einsum("bnp,bp->bn", form.columns(design, np.log(parameters[:, :q])), parameters[:, q:])


FORMS = {
    "plain": "E + A/N^alpha + B/D^beta",
    "offset": "E_k + A/N^alpha + B/D^beta",
    "offset_size": "E_k + A_k/N^alpha + B/D^beta",
    "offset_data": "E_k + A/N^alpha + B_k/D^beta",
    "power": "E + A/N^alpha + B/D^beta + C/(k + k0)^gamma",
    "power_size": "E + A/N^alpha + B/D^beta + C/(k + k0)^gamma + F/(N^alpha (k + k0)^gamma)",
}


def make_form(name: str, levels: Sequence[int], *, size: bool = True, data: bool = True) -> Form:
    """A form over these levels of k.

    Parameters
    ----------
    name
        Of `FORMS`: ``plain`` knows nothing of k, ``offset`` has a floor for each k, ``offset_size`` and
        ``offset_data`` let k change the worth of size or data too, ``power`` is a power law in k and
        ``power_size`` lets it meet size.
    levels
        Every k of the runs.
    size, data
        Whether N and D vary; the term of one that does not cannot be told from the floor, and is left out.
    """
    by_level = name.startswith("offset")

    def terms(letter: str, apart: bool, **parts: bool) -> list[Term]:
        if not apart:
            return [Term(letter, **parts)]
        return [Term(f"{letter}[k={level}]", level, **parts) for level in levels]

    found = terms("E", by_level)
    if size:
        found += terms("A", name == "offset_size", size=True)
    if data:
        found += terms("B", name == "offset_data", data=True)
    if name.startswith("power"):
        found.append(Term("C", neighbours=True))
    if name == "power_size" and size:
        found.append(Term("F", size=True, neighbours=True))
    exponents = ["alpha"] * size + ["beta"] * data + ["gamma", "k0"] * name.startswith("power")
    return Form(name, FORMS[name], tuple(found), tuple(exponents))

"""Gene vocabularies, and the alignment of a file's genes to one of them.

Files name genes by symbol or by Ensembl id, in letters of either case, for one species or another. A
`Vocabulary` is the ordered list of genes that a model knows; `align` says which of them each gene of a file
is, and its report says what was lost. A gene that could be two is reported, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int32

from scfm_jax.errors import DataWarning, InputError
from scfm_jax.gene_files import read_names, read_pairs

Status = Literal["matched", "unmatched", "ambiguous", "merged", "displaced"]
Gene = tuple[str, str]  # name (an Ensembl id without its version) and species

# A stable id is ENS, letters for any species but human, G, and 11 digits. Only these carry a version: in a
# symbol, ".1" is part of the name (AC000032.1 and AC000032.2 are two genes).
_ENSEMBL = re.compile(r"(ENS[A-Z]*G)(\d{11})(\.\d+)?")
_ENSEMBL_SPECIES = {"ENSG": "human", "ENSMUSG": "mouse"}
_PARTNER_SPECIES = {"human": "mouse", "mouse": "human"}
_NONE, _AMBIGUOUS = -1, -2


def _gene(name: str, species: str) -> Gene:
    """An Ensembl id says its own species, whatever its file is said to hold (a xenograft's holds two)."""
    if ensembl := _ENSEMBL.fullmatch(name):
        return ensembl[1] + ensembl[2], _ENSEMBL_SPECIES.get(ensembl[1], species.lower())
    return name, species.lower()


def _symbol(name: str, gene_names: Mapping[str, str]) -> str:
    """The symbol of a gene named by symbol or Ensembl id, "" where unknown."""
    ensembl = _ENSEMBL.fullmatch(name)
    return gene_names.get(ensembl[1] + ensembl[2], "") if ensembl else name


def _in_any_case(names: Iterable[str]) -> dict[str, str]:
    """From each name's folded form to the name; to "" where two names differ by case only."""
    folded: dict[str, str] = {}
    for name in names:
        key = name.casefold()
        folded[key] = "" if key in folded else name
    return folded


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """An ordered list of genes; a gene's index is its token.

    Parameters
    ----------
    ids
        Names as the file gave them, symbols or Ensembl ids, each once for a species: H19 of human and H19 of
        mouse are two genes.
    symbols
        Symbols, for display and to meet files named by symbol; "" where unknown.
    species
        Species of each gene: "human", "mouse" or any other lower-case name.

    Raises
    ------
    InputError
        If a gene is blank or given twice (two versions of an Ensembl id are one gene), or if the three differ
        in length.
    """

    ids: tuple[str, ...]
    symbols: tuple[str, ...]
    species: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.symbols) == len(self.species):
            raise InputError(
                "vocabulary", "ids, symbols and species differ in length", "give all of each gene"
            )
        first: dict[Gene, int] = {}
        for index, (name, species) in enumerate(zip(self.ids, self.species)):
            if not name:
                raise InputError("vocabulary", f"gene {index} has no name", "name it or remove it")
            earlier = first.setdefault(_gene(name, species), index)
            if earlier != index:
                problem = (
                    f"{name!r} (gene {index}) is the same gene as {self.ids[earlier]!r} (gene {earlier})"
                )
                raise InputError("vocabulary", problem, "keep each gene once")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of what the tokens mean: ids and species in order, not the display symbols."""
        return hashlib.sha256(json.dumps([self.ids, self.species]).encode()).hexdigest()

    def to_dict(self) -> dict[str, list[str]]:
        """The fields as lists, ready for JSON."""
        return {"ids": list(self.ids), "symbols": list(self.symbols), "species": list(self.species)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`.

        Raises
        ------
        InputError
            If a field is missing or is not a list of strings.
        """
        for field in ("ids", "symbols", "species"):
            values = content.get(field)
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise InputError("vocabulary", f"{field!r} is not a list of strings", "write it with save()")
        return cls(tuple(content["ids"]), tuple(content["symbols"]), tuple(content["species"]))

    def save(self, path: str | Path) -> None:
        """Write the vocabulary as JSON; `read` gives it back whole."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def read(
        cls, path: str | Path, *, species: str = "human", gene_names: Mapping[str, str] | None = None
    ) -> Vocabulary:
        """Read a vocabulary from a file.

        Parameters
        ----------
        path
            `.tsv` or `.csv`, with or without a header: the column `gene_name`, else `gene`, `symbol` or `id`,
            else the first; a column `index`, where there is one, gives the order. `.json`: a list of names,
            an object from name to index, or what `save` wrote. `.h5ad`: the names of `var`.
        species
            Species of the genes; an Ensembl id says its own, and a saved vocabulary holds its own.
        gene_names
            From Ensembl id to symbol, for `symbols`.

        Raises
        ------
        InputError
            If the file cannot be read, has another extension, holds no gene, or holds one twice.
        """
        content = read_names(Path(path))
        if not isinstance(content, Mapping):
            own_species = [_gene(name, species)[1] for name in content]
            content = {"ids": content, "symbols": [""] * len(content), "species": own_species}
        try:
            bare = cls.from_dict(content)
        except InputError as error:
            raise InputError(path, error.problem, error.mend) from None
        if not bare.ids:
            raise InputError(path, "it holds no gene", "give a file that names at least one")
        symbols = (symbol or _symbol(name, gene_names or {}) for name, symbol in zip(bare.ids, bare.symbols))
        return cls(bare.ids, tuple(symbols), bare.species)

    @classmethod
    def from_names(
        cls,
        sources: Sequence[tuple[Sequence[str], str]],
        *,
        gene_names: Mapping[str, str] | None = None,
        aliases: Mapping[str, str] | None = None,
        orthologs: Orthologs | None = None,
    ) -> Vocabulary:
        """The union of the genes of several files, human files first, else in the order given.

        Genes of two files share an entry where `align`, given the same tables, says that they are one. So
        mouse genes share the entry of their human ortholog where a table gives it and a file has it, and have
        an entry of their own otherwise; and aligned to the result no file loses a gene.

        Parameters
        ----------
        sources
            For each file its gene names and their species.
        gene_names, aliases, orthologs
            As in `align`.

        Raises
        ------
        InputError
            If there is no gene at all, or a blank one.
        """
        vocabulary = cls((), (), ())
        place = partial(align, gene_names=gene_names, aliases=aliases, orthologs=orthologs)
        ordered = sorted(sources, key=lambda source: source[1].lower() != "human")
        # A later file's gene can make an earlier match ambiguous; that gene gets its own entry in the next
        # round. Every round but the last adds genes, so there is a last.
        while True:
            size = len(vocabulary)
            for names, species in ordered:
                target = place(names, vocabulary, species=species).target
                absent = [_gene(name, species) for name, index in zip(names, target) if index < 0]
                genes = list(dict.fromkeys([*zip(vocabulary.ids, vocabulary.species), *absent]))
                vocabulary = cls(
                    ids=tuple(name for name, _ in genes),
                    symbols=tuple(_symbol(name, gene_names or {}) for name, _ in genes),
                    species=tuple(species for _, species in genes),
                )
            if len(vocabulary) == size:
                break
        if not size:
            raise InputError("vocabulary", "the files hold no gene", "give at least one file that does")
        return vocabulary


@dataclass(frozen=True, eq=False)
class Orthologs:
    """Pairs of orthologous genes, human name and mouse name; a gene may stand in several."""

    pairs: tuple[tuple[str, str], ...]

    def partners(self, name: str, species: str) -> tuple[str, ...]:
        """Orthologs in the other species of a human or a mouse gene, each once; none for any other species.

        The gene is looked up as written, else in any case where that leaves one gene.
        """
        if species not in _PARTNER_SPECIES:
            return ()
        partners, folded = self._tables[species]
        return partners.get(name) or partners.get(folded.get(name.casefold(), ""), ())

    @cached_property
    def _tables(self) -> dict[str, tuple[dict[str, tuple[str, ...]], dict[str, str]]]:
        tables = {}
        for species, side in (("human", 0), ("mouse", 1)):
            partners: dict[str, tuple[str, ...]] = {}
            for pair in dict.fromkeys(self.pairs):
                partners[pair[side]] = (*partners.get(pair[side], ()), pair[1 - side])
            tables[species] = (partners, _in_any_case(partners))
        return tables


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where each gene of a file goes.

    Parameters
    ----------
    names
        The file's gene names.
    target
        Vocabulary index of each, -1 where it has none. Columns of the same gene share one: sum them.
    status
        "matched"; "merged" (the same gene as an earlier column, summed with it); "unmatched" (not in the
        vocabulary); "ambiguous" (it could be several genes); "displaced" (another gene keeps its target).
    """

    names: tuple[str, ...]
    target: Int32[np.ndarray, " n"]
    status: tuple[Status, ...]

    def report(self, totals: Float[np.ndarray, " n"]) -> dict[str, Any]:
        """Summarise the alignment for a user.

        Parameters
        ----------
        totals
            Counts of each gene of the file over all its cells.

        Returns
        -------
        dict
            Ready for JSON. `n_matched`, `n_unmatched`, `n_ambiguous`, `n_merged`, `n_displaced`: the file's
            genes by status. `share_lost`: the share of the counts whose gene has no target. `unmatched`,
            `ambiguous`, `merged`, `displaced`: the names, those of most counts first.

        Raises
        ------
        ValueError
            If `totals` has not one entry for each gene of the file.
        """
        totals = np.asarray(totals, np.float64)
        if totals.shape != self.target.shape:
            raise ValueError(f"totals {totals.shape} must have the shape of target {self.target.shape}")
        names: dict[str, list[str]] = {
            status: [] for status in ("matched", "unmatched", "ambiguous", "merged", "displaced")
        }
        for column in np.argsort(-totals, kind="stable").tolist():
            names[self.status[column]].append(self.names[column])
        report: dict[str, Any] = {f"n_{status}": len(genes) for status, genes in names.items()}
        total = totals.sum()
        report["share_lost"] = float(totals[self.target < 0].sum() / total) if total else 0.0
        del names["matched"]
        return report | names


def align(
    names: Sequence[str],
    vocabulary: Vocabulary,
    *,
    species: str,
    gene_names: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    orthologs: Orthologs | None = None,
) -> Alignment:
    """Match a file's genes to a vocabulary.

    A gene is looked up among the vocabulary's genes of its own species: as written (less the version of an
    Ensembl id), then in any case where that leaves one gene, then by its alias. Failing that, a human or a
    mouse gene goes through the orthologs: to a one-to-one ortholog; else to the same-named symbol of the
    other species, where that is among the orthologs or none of these is in the vocabulary. A gene that could
    still be several is ambiguous.

    Columns of the same gene share a target, to be summed. Of distinct genes with one target the one named
    most like it keeps it: same id, same symbol, same in any case; then, whatever the order of the columns,
    the alphabet's first. The others are displaced.

    Parameters
    ----------
    names
        The file's genes, symbols or Ensembl ids.
    vocabulary
        The genes to match them to.
    species
        Species of the file's genes; an Ensembl id says its own.
    gene_names
        From Ensembl id to symbol: files named by one then meet vocabularies named by the other.
    aliases
        From alias to name.
    orthologs
        Without them no symbol is matched to a gene of another species.

    Returns
    -------
    Alignment
        The target and the status of each of the file's genes.
    """
    resolver = _Resolver(vocabulary, gene_names or {}, aliases or {}, orthologs)
    genes = [_gene(name, species) for name in names]
    landings = {gene: resolver.resolve(gene) for gene in dict.fromkeys(genes)}
    keepers: dict[int, Gene] = {}
    for gene, index in landings.items():
        if index >= 0:
            rivals = (gene, keepers.get(index, gene))
            keepers[index] = min(rivals, key=lambda rival: (resolver.unlikeness(rival, index), rival))

    target = np.full(len(genes), -1, np.int32)
    status: list[Status] = []
    placed: set[Gene] = set()
    for column, gene in enumerate(genes):
        index = landings[gene]
        if index < 0:
            status.append("ambiguous" if index == _AMBIGUOUS else "unmatched")
        elif keepers[index] != gene:
            status.append("displaced")
        else:
            target[column] = index
            status.append("merged" if gene in placed else "matched")
            placed.add(gene)
    return Alignment(tuple(names), target, tuple(status))


class _Resolver:
    """The part of `align` that looks at one gene at a time."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        gene_names: Mapping[str, str],
        aliases: Mapping[str, str],
        orthologs: Orthologs | None,
    ) -> None:
        self._gene_names, self._aliases, self._orthologs = gene_names, aliases, orthologs
        self._folded_aliases = _in_any_case(aliases)
        self._genes = [_gene(name, species) for name, species in zip(vocabulary.ids, vocabulary.species)]
        self._symbols = [
            symbol or _symbol(name, gene_names) for symbol, (name, _) in zip(vocabulary.symbols, self._genes)
        ]
        # The surest match first: id, symbol, id in any case, symbol in any case.
        self._levels: tuple[dict[Gene, int], ...] = ({}, {}, {}, {})
        for index, ((name, species), symbol) in enumerate(zip(self._genes, self._symbols)):
            for level, key in zip(self._levels, (name, symbol, name.casefold(), symbol.casefold())):
                if key:
                    level[key, species] = _AMBIGUOUS if (key, species) in level else index

    def resolve(self, gene: Gene) -> int:
        """Vocabulary index of the gene; `_NONE`, or `_AMBIGUOUS` where some attempt is."""
        verdict = _NONE
        for attempt in self._attempts(self._names(gene), gene[1]):
            if attempt >= 0:
                return attempt
            verdict = min(verdict, attempt)
        return verdict

    def unlikeness(self, gene: Gene, index: int) -> int:
        """How far the gene's name is from that of the vocabulary's gene `index`: 0 where it is that gene."""
        if gene == self._genes[index]:
            return 0
        names, goal = self._names(gene), {self._genes[index][0], self._symbols[index]}
        if not goal.isdisjoint(names):
            return 1
        return 2 if {name.casefold() for name in names} & {name.casefold() for name in goal} else 3

    def _names(self, gene: Gene) -> tuple[str, ...]:
        """The gene's name and, where that is an Ensembl id with a known symbol, its symbol."""
        symbol = _symbol(gene[0], self._gene_names)
        return (gene[0], symbol) if symbol not in ("", gene[0]) else gene[:1]

    def _attempts(self, names: tuple[str, ...], species: str) -> Iterator[int]:
        yield self._within(names, species)
        current = tuple(name for alias in names if (name := self._unalias(alias)))
        yield self._within(current, species)
        yield self._across(names, species)
        yield self._across(current, species)

    def _unalias(self, alias: str) -> str:
        folded = self._folded_aliases.get(alias.casefold(), "")
        return self._aliases.get(alias) or self._aliases.get(folded, "")

    def _within(self, names: tuple[str, ...], species: str) -> int:
        folded = tuple(name.casefold() for name in names)
        for level, keys in zip(self._levels, (names, names, folded, folded)):
            for key in keys:
                if (key, species) in level:
                    return level[key, species]
        return _NONE

    def _across(self, names: tuple[str, ...], species: str) -> int:
        if self._orthologs is None:
            return _NONE
        partners = next((found for name in names if (found := self._orthologs.partners(name, species))), ())
        if not partners:
            return _NONE
        other, symbol = _PARTNER_SPECIES[species], names[-1]
        landings = {partner: self._within((partner,), other) for partner in partners}
        one_to_one = len(partners) == 1 and len(self._orthologs.partners(partners[0], other)) == 1
        if one_to_one and landings[partners[0]] != _NONE:
            return landings[partners[0]]
        for partner, landing in landings.items():
            if partner.casefold() == symbol.casefold():
                return landing
        # Symbols age: a new table may give a new human symbol where the vocabulary holds the old one.
        if all(landing == _NONE for landing in landings.values()):
            return self._within((symbol,), other)
        return _AMBIGUOUS


def read_gene_names(path: str | Path) -> dict[str, str]:
    """Read a table of Ensembl id and symbol (`.csv` or `.tsv`, with or without a header).

    Versions are removed from the ids. A gene without a symbol (blank, or its id again, as in GENCODE) is left
    out.

    Raises
    ------
    InputError
        If the file cannot be read, has fewer than two columns, or gives a gene two symbols.
    """
    names: dict[str, str] = {}
    for line, identifier, symbol in read_pairs(Path(path)):
        gene, _ = _gene(identifier, "")
        if gene and symbol and _gene(symbol, "")[0] != gene and names.setdefault(gene, symbol) != symbol:
            problem = f"line {line} gives {gene!r} the symbol {symbol!r}, an earlier one {names[gene]!r}"
            raise InputError(path, problem, "keep one symbol for each id")
    return names


def read_orthologs(path: str | Path) -> Orthologs:
    """Read a table of human symbol and mouse symbol (`.csv` or `.tsv`, with or without a header).

    A blank on either side says that the gene has no ortholog.

    Raises
    ------
    InputError
        If the file cannot be read or has fewer than two columns.
    """
    return Orthologs(tuple((human, mouse) for _, human, mouse in read_pairs(Path(path)) if human and mouse))


def read_aliases(path: str | Path) -> dict[str, str]:
    """Read a table of alias and name (`.csv` or `.tsv`, with or without a header).

    An alias of several names does not say which is meant: it is left out, with a warning.

    Raises
    ------
    InputError
        If the file cannot be read or has fewer than two columns.
    """
    names: dict[str, set[str]] = {}
    for _, alias, name in read_pairs(Path(path)):
        if alias and name:
            names.setdefault(alias, set()).add(name)
    shared = [alias for alias, candidates in names.items() if len(candidates) > 1]
    if shared:
        problem = f"{len(shared)} aliases of several names are not used, the first is {shared[0]!r}"
        warnings.warn(f"{path}: {problem}", DataWarning, stacklevel=2)
    return {alias: candidates.pop() for alias, candidates in names.items() if len(candidates) == 1}

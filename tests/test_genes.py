"""Gene vocabularies and alignment, against the rule stated in plain Python and against the real files."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm_jax.errors import InputError
from scfm_jax.genes import (
    Orthologs,
    Vocabulary,
    align,
    read_gene_names,
    read_orthologs,
)

DATA = Path(os.environ.get("SCFM_DATA", Path(__file__).parents[2] / "shared" / "data"))
MAPS = DATA.parent / "gene_maps"
MERFISH = "merfish_mouse_hypothalamus"
COSMX = "cosmx_human_nsclc_lung5_rep3"
PBMC = "chromium_human_pbmc_6k"
SPECIES = {
    MERFISH: "mouse",
    "seqfish_mouse_embryo2": "mouse",
    COSMX: "human",
    "extra_xenium_human_breast_34k_unlabelled": "human",
    "xenium_human_breast_10k": "human",
    PBMC: "human",
}


def real(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is absent (set SCFM_DATA)")
    return path


@pytest.fixture(scope="module")
def published() -> Vocabulary:
    return Vocabulary.read(real(MAPS / "OS_scRNA_gene_index.19264.tsv"))


@pytest.fixture(scope="module")
def gencode() -> dict[str, str]:
    return read_gene_names(real(MAPS / "GENCODEv44_Gene_id2name.csv"))


@pytest.fixture(scope="module")
def orthologs() -> Orthologs:
    return read_orthologs(real(MAPS / "Ensembl105_Human2Mouse_Genes.csv"))


def names_of(file: str) -> list[str]:
    return list(anndata.read_h5ad(real(DATA / f"{file}.h5ad"), backed="r").var_names)


def totals_of(file: str) -> np.ndarray:
    return np.asarray(anndata.read_h5ad(real(DATA / f"{file}.h5ad")).X.sum(axis=0)).ravel()


def human(*names: str) -> Vocabulary:
    return Vocabulary(names, names, ("human",) * len(names))


# --- the rule, stated plainly ---


def plain_align(names, vocabulary, species, gene_names, aliases, pairs):
    """Item 3 of the issue as filters over lists: no index, no shared code."""

    def bare(name):
        return name.split(".")[0] if re.match(r"ENS(MUS)?G\d{11}\.\d+$", name) else name

    def kind(name):
        return "human" if name.startswith("ENSG0") else "mouse" if name.startswith("ENSMUSG0") else species

    def calls(name):
        return [c for c in ([name, gene_names.get(name)] if name.startswith("ENS") else [name]) if c]

    entries = [
        (bare(i), s or gene_names.get(bare(i), ""), k)
        for i, s, k in zip(vocabulary.ids, vocabulary.symbols, vocabulary.species)
    ]

    def among(species, wanted):
        for fold in (str, str.casefold):
            for field in (0, 1):
                for want in wanted:
                    hits = [n for n, e in enumerate(entries) if e[2] == species and e[field]]
                    hits = [n for n in hits if fold(entries[n][field]) == fold(want)]
                    if hits:
                        return hits
        return []

    def lookup(table, key):
        """All values of the rows whose key is the given one, else the only one like it in any case."""
        keys = {k for k, _ in table}
        like = {k for k in keys if k.casefold() == key.casefold()}
        chosen = key if key in keys else like.pop() if len(like) == 1 else None
        return sorted({v for k, v in table if k == chosen})

    def unalias(wanted):
        return [v for want in wanted for v in lookup(aliases.items(), want)]

    def through_orthologs(wanted, species):
        there = {"human": pairs, "mouse": [(m, h) for h, m in pairs]}.get(species, [])
        back = [(b, a) for a, b in there]
        targets = next((t for want in wanted if (t := lookup(there, want))), [])
        other = "mouse" if species == "human" else "human"
        if not targets:
            return []
        if len(targets) == 1 and len(lookup(back, targets[0])) == 1 and among(other, targets):
            return among(other, targets)
        same_named = [t for t in targets if t.casefold() == wanted[-1].casefold()]
        if same_named:
            return among(other, same_named[:1])
        if not any(among(other, [t]) for t in targets):
            return among(other, wanted[-1:])
        return ["several"] * 2

    def place(name):
        gene, species = bare(name), kind(name)
        tries = [
            among(species, calls(gene)),
            among(species, unalias(calls(gene))),
            through_orthologs(calls(gene), species),
            through_orthologs(unalias(calls(gene)), species),
        ]
        unique = [hits[0] for hits in tries if len(hits) == 1]
        return unique[0] if unique else "ambiguous" if any(tries) else "unmatched"

    def distance(name, index):
        gene, (entry, symbol, entry_species) = bare(name), entries[index]
        if gene == entry and kind(name) == entry_species:
            return 0
        if set(calls(gene)) & {entry, symbol}:
            return 1
        return 2 if {c.casefold() for c in calls(gene)} & {entry.casefold(), symbol.casefold()} else 3

    placed = [place(name) for name in names]
    result = []
    for column, (name, index) in enumerate(zip(names, placed)):
        if isinstance(index, str):
            result.append((-1, index))
            continue
        rivals = {(bare(n), kind(n)): distance(n, index) for n, p in zip(names, placed) if p == index}
        best = min((d, gene) for gene, d in rivals.items())[1]
        if best != (bare(name), kind(name)):
            result.append((-1, "displaced"))
        else:
            earlier = any((bare(n), kind(n)) == best for n in names[:column])
            result.append((index, "merged" if earlier else "matched"))
    return result


POOL = ["AB", "Ab", "ab", "CD", "Cd", "EF", "Ef", "G.1", "G.2", "g.1"]
IDS = ["ENSG00000000001", "ENSG00000000002", "ENSMUSG00000000001"]


def random_case(seed: int):
    rng = random.Random(seed)

    def some(pool, low, high):
        return [rng.choice(pool) for _ in range(rng.randint(low, high))]

    versioned = [*IDS, *(f"{i}.{v}" for i in IDS for v in (1, 2))]
    entries = sorted({(name, rng.choice(["human", "mouse"])) for name in some(POOL + IDS, 1, 7)})
    rng.shuffle(entries)
    entries = [(i, "human" if i.startswith("ENSG0") else "mouse" if "MUS" in i else s) for i, s in entries]
    entries = list(dict.fromkeys(entries))
    gene_names = {i: rng.choice(POOL) for i in IDS if rng.random() < 0.6}
    vocabulary = Vocabulary(
        tuple(i for i, _ in entries),
        tuple("" if i in IDS else i for i, _ in entries),
        tuple(s for _, s in entries),
    )
    names = some(POOL + versioned, 1, 8)
    aliases = {a: rng.choice(POOL) for a in some(POOL, 0, 3)}
    pairs = list(zip(some(POOL, 0, 6), some(POOL, 6, 6)))
    return names, vocabulary, rng.choice(["human", "mouse", "rat"]), gene_names, aliases, pairs


def test_alignment_is_the_plain_rule_on_random_cases():
    seen: Counter[str] = Counter()
    for seed in range(3000):
        names, vocabulary, species, gene_names, aliases, pairs = random_case(seed)
        found = align(
            names,
            vocabulary,
            species=species,
            gene_names=gene_names,
            aliases=aliases,
            orthologs=Orthologs(tuple(pairs)),
        )
        expected = plain_align(names, vocabulary, species, gene_names, aliases, pairs)
        assert list(zip(found.target.tolist(), found.status)) == expected, f"seed {seed}"
        seen.update(found.status)
    assert min(seen[s] for s in ("matched", "unmatched", "ambiguous", "merged", "displaced")) > 100, seen


def test_alignment_does_not_depend_on_the_order_of_columns():
    for seed in range(500):
        names, vocabulary, species, gene_names, aliases, pairs = random_case(seed)
        tables = {"gene_names": gene_names, "aliases": aliases, "orthologs": Orthologs(tuple(pairs))}
        forwards = align(names, vocabulary, species=species, **tables).target
        backwards = align(names[::-1], vocabulary, species=species, **tables).target
        np.testing.assert_array_equal(forwards, backwards[::-1])


# --- single rules ---


def statuses(names, vocabulary, **settings):
    found = align(names, vocabulary, **({"species": "human"} | settings))
    return list(zip(found.target.tolist(), found.status))


def test_only_ensembl_ids_lose_a_version():
    vocabulary = human("ENSG00000121270", "AC000032", "ENSG0000012127")
    assert statuses(["ENSG00000121270.5"], vocabulary) == [(0, "matched")]
    assert statuses(["AC000032.1", "ENSG0000012127.5"], vocabulary) == [(-1, "unmatched")] * 2
    mouse = Vocabulary(("ENSMUSG00000024647",), ("",), ("mouse",))
    assert statuses(["ENSMUSG00000024647.12"], mouse, species="mouse") == [(0, "matched")]


def test_case_is_ignored_only_where_that_leaves_one_gene_of_the_species():
    vocabulary = Vocabulary(("C9orf16", "AB", "Ab", "ACTB"), ("",) * 4, ("human",) * 4)
    names = ["C9ORF16", "ab", "Ab"]
    assert statuses(names, vocabulary) == [(0, "matched"), (-1, "ambiguous"), (2, "matched")]
    assert statuses(["Actb", "ACTB"], vocabulary, species="mouse") == [(-1, "unmatched")] * 2


def test_aliases_come_after_the_name_itself():
    aliases = {"CYR61": "CCN1", "ACTB": "CCN1"}
    expected = [(0, "matched"), (1, "matched")]
    assert statuses(["CYR61", "ACTB"], human("CCN1", "ACTB"), aliases=aliases) == expected
    assert statuses(["CYR61", "CCN1"], human("CCN1"), aliases=aliases) == [(-1, "displaced"), (0, "matched")]


@pytest.mark.parametrize(
    ("pairs", "vocabulary", "expected"),
    [
        ([("ABC", "Xyz")], ["ABC", "XYZ"], (0, "matched")),
        ([("ABC", "Xyz")], ["XYZ"], (0, "matched")),
        ([("ABC", "Xyz")], ["DEF"], (-1, "unmatched")),
        ([("ABC", "Xyz"), ("XYZ", "Xyz")], ["ABC", "XYZ"], (1, "matched")),
        ([("ABC", "Xyz"), ("DEF", "Xyz")], ["ABC", "XYZ"], (-1, "ambiguous")),
        ([("ABC", "Xyz"), ("DEF", "Xyz")], ["XYZ"], (0, "matched")),
        ([("ABC", "Xyz"), ("ABC", "Abc")], ["ABC", "XYZ"], (-1, "ambiguous")),
        ([("ABC", "Other")], ["ABC", "XYZ"], (-1, "unmatched")),
        ([("ABC", "Xyz"), ("ABC", "Xyz")], ["ABC"], (0, "matched")),
    ],
)
def test_mouse_genes_go_through_the_orthologs(pairs, vocabulary, expected):
    assert statuses(["Xyz"], human(*vocabulary), species="mouse", orthologs=Orthologs(tuple(pairs))) == [
        expected
    ]


def test_human_genes_reach_a_mouse_vocabulary_by_the_same_rule():
    vocabulary = Vocabulary(("Actb", "Serpinb1a"), ("", ""), ("mouse", "mouse"))
    table = Orthologs((("ACTB", "Actb"), ("SERPINB1", "Serpinb1a"), ("SERPINB1", "Serpinb1b")))
    assert statuses(["ACTB", "SERPINB1"], vocabulary, orthologs=table) == [(0, "matched"), (-1, "ambiguous")]


def test_rows_of_one_gene_are_summed_and_distinct_genes_are_not():
    versions = ["ENSG00000121270.5", "ENSG00000121270.6", "ENSG00000121270"]
    expected = [(0, "matched"), (0, "merged"), (0, "merged")]
    assert statuses(versions, human("ENSG00000121270")) == expected
    assert statuses(["actb", "Actb", "ACTB"], human("ACTB"))[2] == (0, "matched")
    assert [s for _, s in statuses(["actb", "Actb", "ACTB"], human("ACTB"))[:2]] == ["displaced"] * 2


def test_gene_names_join_ids_and_symbols_both_ways():
    gene_names = {"ENSG00000075624": "ACTB", "ENSG00000111640": "GAPDH"}
    ids = ["ENSG00000111640.15", "ENSG00000075624.3"]
    assert statuses(ids, human("ACTB", "GAPDH"), gene_names=gene_names) == [(1, "matched"), (0, "matched")]
    assert statuses(ids, human("ACTB", "GAPDH")) == [(-1, "unmatched")] * 2
    by_id = Vocabulary(tuple(gene_names), ("", ""), ("human", "human"))
    assert statuses(["GAPDH", "ACTB"], by_id, gene_names=gene_names) == [(1, "matched"), (0, "matched")]


def test_report_counts_the_genes_and_the_share_lost():
    found = align(["AB", "no", "ab", "never", "AB"], human("AB"), species="human")
    report = found.report(np.array([4.0, 1.0, 2.0, 3.0, 10.0]))
    counts = [report[f"n_{s}"] for s in ("matched", "unmatched", "ambiguous", "merged", "displaced")]
    assert counts == [1, 2, 0, 1, 1]
    assert report["share_lost"] == pytest.approx(6 / 20)
    assert (report["unmatched"], report["displaced"], report["merged"]) == (["never", "no"], ["ab"], ["AB"])
    json.dumps(report)
    assert found.report(np.zeros(5))["share_lost"] == 0.0
    with pytest.raises(ValueError, match="shape"):
        found.report(np.zeros(4))


# --- vocabularies ---


def test_from_names_loses_no_gene_of_its_files():
    for seed in range(500):
        names, vocabulary, species, gene_names, aliases, pairs = random_case(seed)
        tables = {"gene_names": gene_names, "aliases": aliases, "orthologs": Orthologs(tuple(pairs))}
        sources = [(names, species), (list(vocabulary.ids), "mouse"), (names[:3], "human")]
        union = Vocabulary.from_names(sources, **tables)
        used = set()
        for file, file_species in sources:
            target = align(file, union, species=file_species, **tables).target
            assert (target >= 0).all(), f"seed {seed}"
            used.update(target.tolist())
        assert used <= set(range(len(union)))


def test_from_names_shares_a_gene_of_two_species_only_through_orthologs():
    sources = [(["Actb", "H19", "Gm10"], "mouse"), (["ACTB", "H19", "GM10"], "human")]
    apart = Vocabulary.from_names(sources)
    assert apart.ids == ("ACTB", "H19", "GM10", "Actb", "H19", "Gm10")
    assert apart.species == ("human",) * 3 + ("mouse",) * 3
    joined = Vocabulary.from_names(sources, orthologs=Orthologs((("ACTB", "Actb"), ("H19", "H19"))))
    assert list(zip(joined.ids, joined.species))[3:] == [("Gm10", "mouse")]


def test_from_names_joins_ids_and_symbols_of_one_species():
    sources = [(["ENSG00000075624.3", "ENSG00000111640"], "human"), (["ACTB", "CD4"], "human")]
    union = Vocabulary.from_names(sources, gene_names={"ENSG00000075624": "ACTB"})
    assert union.ids == ("ENSG00000075624", "ENSG00000111640", "CD4")
    assert union.symbols == ("ACTB", "", "CD4")
    assert len(Vocabulary.from_names(sources)) == 4


def test_hash_says_what_the_tokens_mean():
    same = Vocabulary(("A", "B"), ("", ""), ("human", "human"))
    assert human("A", "B").hash == same.hash
    assert len({human("A", "B").hash, human("B", "A").hash, human("A").hash, human("AB").hash}) == 4
    assert Vocabulary(("A", "B"), ("A", "B"), ("human", "mouse")).hash != same.hash


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = Vocabulary(("ENSG00000075624", "Actb", "µ"), ("ACTB", "", ""), ("human", "mouse", "yeast"))
    vocabulary.save(tmp_path / "genes.json")
    read = Vocabulary.read(tmp_path / "genes.json")
    assert (read.hash, read.to_dict()["species"]) == (vocabulary.hash, ["human", "mouse", "yeast"])
    assert read.symbols == ("ACTB", "Actb", "µ")


def test_no_genes_at_all_is_an_error():
    with pytest.raises(InputError, match="no gene"):
        Vocabulary.from_names([([], "human")])


def test_genes_need_no_jax():
    program = "import sys, scfm_jax.genes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- the real files ---


def test_published_vocabularies_read(published, gencode):
    lines = (MAPS / "OS_scRNA_gene_index.19264.tsv").read_text().splitlines()[1:]
    assert published.ids == tuple(line.split("\t")[0] for line in lines)
    assert len(published) == 19_264
    nicheformer = Vocabulary.read(real(MAPS / "nicheformer_model_vocab.h5ad"), gene_names=gencode)
    assert Counter(nicheformer.species) == {"human": 20_159, "mouse": 151}
    assert nicheformer.symbols[nicheformer.ids.index("ENSG00000075624")] == "ACTB"


def test_symbols_of_pbmc_do_not_collide(published):
    names = names_of(PBMC)
    stripped = Counter(re.sub(r"\.\d+$", "", name) for name in names)
    assert sum(stripped.values()) - len(stripped) > 500
    itself = align(names, Vocabulary.from_names([(names, "human")]), species="human")
    np.testing.assert_array_equal(itself.target, np.arange(len(names)))
    found = align(names, published, species="human")
    index = {name: token for token, name in enumerate(published.ids)}
    np.testing.assert_array_equal(found.target, [index.get(name, -1) for name in names])
    assert set(found.status) == {"matched", "unmatched"}


def test_cosmx_loses_an_eighth_of_its_counts_to_the_published_genes(published):
    names, totals = names_of(COSMX), totals_of(COSMX)
    report = align(names, published, species="human").report(totals)
    absent = ~pd.Index(names).isin(published.ids)
    assert report["share_lost"] == pytest.approx(totals[absent].sum() / totals.sum(), rel=1e-6)
    assert 0.12 < report["share_lost"] < 0.13
    assert report["unmatched"][0] == "MALAT1"


def test_merfish_reaches_human_genes_through_the_orthologs(published, orthologs):
    names = names_of(MERFISH)
    assert align(names, published, species="mouse").status == ("unmatched",) * len(names)
    found = align(names, published, species="mouse", orthologs=orthologs)
    table = pd.read_csv(MAPS / "Ensembl105_Human2Mouse_Genes.csv", header=None, names=["human", "mouse"])
    table = table.dropna().drop_duplicates()
    single = table[~table.human.duplicated(keep=False) & ~table.mouse.duplicated(keep=False)]
    human_of = {m: h for m, h in zip(single.mouse, single.human) if h in published.ids}
    reached = {name: published.ids[token] for name, token in zip(names, found.target) if token >= 0}
    assert reached == {name: human_of.get(name, name.upper()) for name in reached}
    assert reached["Crhr1"] == "CRHR1"  # the table knows only the read-through LINC02210-CRHR1
    report = found.report(totals_of(MERFISH))
    assert (report["n_matched"], report["n_ambiguous"], report["n_unmatched"]) == (129, 3, 3)
    assert sorted(report["ambiguous"]) == ["Fbxw13", "Serpinb1b", "Slco1a4"]
    assert 0.04 < report["share_lost"] < 0.045


def test_one_vocabulary_of_all_six_files_loses_nothing(gencode, orthologs):
    sources = [(names_of(file), species) for file, species in SPECIES.items()]
    tables = {"gene_names": gencode, "orthologs": orthologs}
    union = Vocabulary.from_names(sources, **tables)
    for names, species in sources:
        assert set(align(names, union, species=species, **tables).status) == {"matched"}
    mouse = {name for names, species in sources if species == "mouse" for name in names}
    own = {name for name, species in zip(union.ids, union.species) if species == "mouse"}
    assert own < mouse
    apart = Vocabulary.from_names(sources, gene_names=gencode)
    assert sum(species == "mouse" for species in apart.species) == len(mouse)
    assert len(Vocabulary.from_names(sources)) > len(apart) > len(union)

"""Gene names and tables in every form of file, good and bad."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from scfm_jax.errors import DataWarning, InputError
from scfm_jax.genes import Vocabulary, read_aliases, read_gene_names, read_orthologs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "gene_name\tindex\nNA\t0\nTP53\t1\nActb\t2\n"),
        ("a.tsv", "index\tgene_name\n2\tActb\n0\tNA\n1\tTP53\n"),
        ("a.csv", "\ufeffNA\r\nTP53\r\n\r\nActb\r\n"),
        ("a.csv", "feature_id,gene\nx,NA\ny,TP53\nz,Actb\n"),
        ("a.csv", "Name,chromosome\nNA,1\nTP53,17\nActb,7\n"),
        ("a.json", '["NA", "TP53", "Actb"]'),
        ("a.json", '{"TP53": 1, "Actb": 2, "NA": 0}'),
    ],
)
def test_every_form_of_file_reads(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    vocabulary = Vocabulary.read(tmp_path / name, species="Mouse")
    assert vocabulary.ids == vocabulary.symbols == ("NA", "TP53", "Actb")
    assert set(vocabulary.species) == {"mouse"}


def test_the_var_of_an_h5ad_reads_and_ids_say_their_species(tmp_path):
    names = ["ENSG00000075624.2", "ENSMUSG00000029580", "Blank"]
    anndata.AnnData(np.zeros((2, 3), np.float32), var=pd.DataFrame(index=names)).write_h5ad(
        tmp_path / "a.h5ad"
    )
    vocabulary = Vocabulary.read(tmp_path / "a.h5ad", gene_names={"ENSG00000075624": "ACTB"})
    assert vocabulary.ids == tuple(names)
    assert vocabulary.symbols == ("ACTB", "", "Blank")
    assert vocabulary.species == ("human", "mouse", "human")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.tsv", None, "cannot be read"),
        ("missing.json", None, "cannot be read"),
        ("missing.h5ad", None, "cannot be read"),
        ("a.xlsx", b"", "'.xlsx'"),
        ("a.tsv", b"", "empty"),
        ("a.tsv", b"gene_name\tindex\n", "no gene"),
        ("a.json", b"[]", "no gene"),
        ("a.csv", b"gene\nB\nA\nC\nC\nA\n", "'C'"),
        ("a.csv", b"gene\nENSG00000075624.1\nENSG00000075624.2\n", "'ENSG00000075624.2'"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.tsv", b"gene_name\tindex\nA\t0\nB\t2\n", "index"),
        ("a.tsv", b"gene_name\tindex\nA\t0\nB\tx\n", "index"),
        ("a.tsv", b"gene_name\tindex\nA\t0\nB\n", "line 3"),
        ("a.tsv", b"gene_name\tindex\nA\t0\n\t1\n", "no name"),
        ("a.json", b'{"A": 0, "B": 0}', "index"),
        ("a.json", b'{"ids": ["A"], "symbols": ["A"]}', "'species'"),
        ("a.json", b'{"ids": ["A"], "symbols": ["A"], "species": []}', "length"),
        ("a.json", b'["A", 1]', "list of names"),
        ("a.json", b"[", "cannot be read"),
        ("a.h5ad", b"\x89HDF\r\n\x1a\n truncated", "cannot be read"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        Vocabulary.read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_tables_read_with_and_without_a_header(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(
        "gene_id,symbol\nENSG00000075624.9,ACTB\nENSG00000000001,ENSG00000000001\nENSG00000000002,\n"
    )
    assert read_gene_names(table) == {"ENSG00000075624": "ACTB"}
    table.write_text("MT-TF,\nMT-ND1,mt-Nd1\n,Xyz\n")
    assert read_orthologs(table).pairs == (("MT-ND1", "mt-Nd1"),)
    table.write_text("alias,name\nCYR61,CCN1\nIGFBP10,CCN1\n")
    assert read_aliases(table) == {"CYR61": "CCN1", "IGFBP10": "CCN1"}
    table.write_text("CYR61,CCN1\nP1,CCN1\nP1,TP53\n")
    with pytest.warns(DataWarning, match="'P1'"):
        assert read_aliases(table) == {"CYR61": "CCN1"}
    table.write_text("ENSG00000075624.1,ACTB\nENSG00000075624.2,GAPDH\n")
    with pytest.raises(InputError, match="line 2"):
        read_gene_names(table)
    table.write_text("CYR61,CCN1\nP1\n")
    for read in (read_aliases, read_gene_names, read_orthologs):
        with pytest.raises(InputError, match=r"t\.csv: line 2"):
            read(table)
    with pytest.raises(InputError, match=r"'\.txt'"):
        read_aliases(tmp_path / "t.txt")

"""The report: PNG files that show the data given, and one page that holds them and needs nothing else."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from scfm_jax.downstream.drawing import PALETTE
from scfm_jax.downstream.page import Table
from scfm_jax.downstream.report import Predictions, Tissue, write_report
from scfm_jax.errors import InputError

HISTORY = [{"step": s, "loss": 2.0 - s / 100} for s in range(0, 100, 2)] + [
    {"step": s, "held_out_loss": 2.1 - s / 100} for s in (0, 50, 98)
]
WHITE = np.ones(3)


class Page(HTMLParser):
    """Everything that the page's tags say: images, addresses, and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


def tissue(wrong=(), n=400):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 500, (n, 2))
    domain = np.where(xy[:, 0] < 250, "left", "right")
    predicted = domain.copy()
    for cell in wrong:
        predicted[cell] = "right" if domain[cell] == "left" else "left"
    return Tissue([xy], [domain], [predicted], ["slide 1"])


def predictions():
    true = np.random.default_rng(1).gamma(1, 1, 2000)
    return Predictions(true, true * 0.7 + 0.2)


def near(image, colour):
    return np.abs(image[..., :3] - to_rgb(colour)).max(-1) < 0.1


def test_page_holds_every_figure_byte_for_byte_and_no_outside_asset(tmp_path):
    path = write_report(
        tmp_path / "run", title="Demo", history=HISTORY, predictions=predictions(), tissue=tissue([1])
    )
    files = sorted((tmp_path / "run" / "figures").iterdir())
    assert [f.name for f in files] == ["expression.png", "loss.png", "tissue.png"]
    page = Page(path.read_text(encoding="utf-8"))
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.images)
    held = [base64.b64decode(source.removeprefix(prefix)) for source in page.images]
    assert sorted(held) == sorted(f.read_bytes() for f in files)
    for file in files:
        image = matplotlib.image.imread(file)  # decodes, so it is a PNG
        assert image.shape[0] > 300
        assert image.shape[1] > 600
        assert (image[..., :3] < 0.9).any()
    addresses = [value for name, value in page.attributes if name in ("href", "src", "srcset")]
    assert all(value.startswith("data:") for value in addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in path.read_text(encoding="utf-8")


def test_parts_not_given_are_left_out(tmp_path):
    write_report(tmp_path, title="Loss alone", history=HISTORY)
    assert [f.name for f in (tmp_path / "figures").iterdir()] == ["loss.png"]


def test_loss_figure_draws_the_series_given(tmp_path):
    def drawn(history):
        write_report(tmp_path, title="t", history=history)
        image = matplotlib.image.imread(tmp_path / "figures" / "loss.png")
        return near(image, PALETTE[0]), near(image, PALETTE[5])

    training, held_out = drawn(HISTORY)
    assert training.sum() > 500
    assert held_out.sum() > 300
    assert not drawn([row for row in HISTORY if "loss" in row])[1].any()
    # A falling loss runs from the upper left to the lower right, a rising one the other way; no legend.
    rising = [{"step": row["step"], "loss": 4.0 - row["loss"]} for row in HISTORY if "loss" in row]
    for history, sign in ((HISTORY[:50], 1), (rising, -1)):
        rows, columns = np.nonzero(drawn(history)[0][:, :600])
        assert np.sign(np.corrcoef(rows, columns)[0, 1]) == sign


def test_tissue_figure_colours_cells_by_domain_and_marks_the_wrong_ones(tmp_path):
    def image(wrong):
        write_report(tmp_path, title="t", history=HISTORY, tissue=tissue(wrong))
        return matplotlib.image.imread(tmp_path / "figures" / "tissue.png")

    right = image([])
    half = right.shape[1] // 2
    panel = right[: int(0.85 * right.shape[0]), :half]
    left_colour, right_colour = (np.nonzero(near(panel, PALETTE[i]))[1] for i in (0, 1))
    assert len(left_colour) > 2000
    assert left_colour.max() < right_colour.min() + 20  # a disc wide
    wrong = image(range(0, 400, 8))
    # Below the titles, one of which gives the share that is right, and above the legend.
    body = slice(40, int(0.85 * right.shape[0]))
    changed = np.abs(right - wrong)[body, :, :3].max(-1) > 0.1
    assert not changed[:, : half - 20].any()
    assert changed[:, half:].sum() > 500
    dark = wrong[body, half:, :3].max(-1) < 0.3
    assert (dark & changed[:, half:]).sum() > 100
    assert "50 of them (12.5%) wrong" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_more_domains_than_colours_stay_apart(tmp_path):
    rng = np.random.default_rng(0)
    xy, domain = rng.uniform(0, 100, (3000, 2)), np.arange(3000) % 20
    write_report(tmp_path, title="t", history=HISTORY, tissue=Tissue([xy], [domain], [domain], ["s"]))
    image = (matplotlib.image.imread(tmp_path / "figures" / "tissue.png")[..., :3] * 255).astype(int)
    counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)[1]
    assert (counts > 300).sum() >= 21  # 20 domains and the white page


def test_text_is_escaped_and_tables_are_as_given(tmp_path):
    table = Table(
        "Error <all>",
        ["method & k", "error", "cells"],
        [["<script>alert(1)</script>", 0.412345, 12345], ["mean", float("nan"), np.int64(7)]],
    )
    path = write_report(
        tmp_path,
        title='<b>"k" = 8</b>',
        history=HISTORY,
        tables=[table],
        tissue=tissue()._replace(slides=["<i>"]),
        notes=["a < b & c"],
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "i"} & set(page.tags)
    for expected in ('<b>"k" = 8</b>', "a < b & c", "Error <all>", "<script>alert(1)</script>", "method & k"):
        assert expected in page.texts
    cells = page.texts[page.texts.index("method & k") :]
    assert cells[:9] == [
        "method & k",
        "error",
        "cells",
        "<script>alert(1)</script>",
        "0.4123",
        "12,345",
        "mean",
        "–",
        "7",
    ]


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"history": [{"step": 1, "rate": 0.1}]}, "history"),
        ({"history": HISTORY, "predictions": Predictions(np.ones(1), np.ones(1))}, "predictions"),
        ({"history": HISTORY, "tissue": Tissue([], [], [], [])}, "tissue"),
    ],
)
def test_nothing_to_draw_is_an_error_that_names_the_part(tmp_path, arguments, field):
    with pytest.raises(InputError, match=field):
        write_report(tmp_path, title="t", **arguments)


@pytest.mark.parametrize(
    "case",
    [
        {"predictions": Predictions(np.zeros(50), np.full(50, 0.3))},
        {"tissue": Tissue([np.zeros((1, 2))], [np.array([1])], [np.array([2])], ["one cell"])},
        {"history": [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 3.0}]},
    ],
)
def test_degenerate_data_still_draws(tmp_path, case):
    path = write_report(tmp_path, title="t", **{"history": HISTORY, **case})
    assert len(Page(path.read_text(encoding="utf-8")).images) == len(list((tmp_path / "figures").iterdir()))

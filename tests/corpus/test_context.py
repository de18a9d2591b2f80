"""The cells around a centre against plain loops, and what an exchange keeps and changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

from scfm_jax.corpus import Corpus, Source, build_corpus
from scfm_jax.corpus.context import Context, random_cycles
from scfm_jax.errors import InputError

K = 5
LABELS = ("domain", "half_known")


@pytest.fixture(scope="module")
def centres(simulated) -> np.ndarray:
    return np.random.default_rng(0).permutation(simulated.n_cells)


@pytest.fixture(scope="module")
def classes(simulated) -> list[tuple[int, ...]]:
    """Slide and labels of each cell."""
    slide = simulated.slide_of(np.arange(simulated.n_cells))
    return list(zip(slide.tolist(), *(simulated.labels(name)[0].tolist() for name in LABELS)))


def test_the_nearest_are_skipped_and_the_next_follow(simulated, centres):
    for skipped in (0, 3):
        places, shown = Context(simulated, K, skip_nearest=skipped).members(centres)
        assert shown is places and np.array_equal(places[:, 0], centres)
        assert np.array_equal(places[:, 1:], simulated.neighbours(centres, 12)[:, skipped : skipped + K])


def test_an_exchange_keeps_places_slides_and_classes_and_changes_the_cells(simulated, centres, classes):
    places, shown = Context(simulated, K, skip_nearest=2, exchanged_within=LABELS).members(centres)
    assert np.array_equal(places[:, 1:], simulated.neighbours(centres, 12)[:, 2 : 2 + K])
    assert np.array_equal(shown[:, 0], centres) and np.array_equal(shown < 0, places < 0)
    sizes = Counter(classes)
    for stand, show in zip(places.tolist(), shown.tolist(), strict=True):
        centre, *stand = (cell for cell in stand if cell >= 0)
        show = [cell for cell in show[1:] if cell >= 0]
        assert len(set(show)) == len(show) and centre not in show
        for place, cell in zip(stand, show, strict=True):
            assert classes[cell] == classes[place]
            others = sizes[classes[place]] - 1 - (classes[centre] == classes[place])
            assert (cell == place) == (others == 0)


def test_an_exchange_is_one_permutation_but_for_the_centre(simulated, centres):
    """What stands in for a cell is always the same, unless that is the centre: then what stands in for it."""
    places, shown = Context(simulated, K, exchanged_within=LABELS).members(centres)
    seen: dict[int, Counter[int]] = {}
    for stand, show in zip(places.tolist(), shown.tolist(), strict=True):
        for place, cell in zip(stand[1:], show[1:], strict=True):
            if place >= 0:
                seen.setdefault(place, Counter())[cell] += 1
    stand_in = {place: cells.most_common(1)[0][0] for place, cells in seen.items() if cells.total() > 2}
    assert len(set(stand_in.values())) == len(stand_in) > 600
    rare = 0
    for stand, show in zip(places.tolist(), shown.tolist(), strict=True):
        for place, cell in zip(stand[1:], show[1:], strict=True):
            if place in stand_in and cell != stand_in[place]:
                rare += 1
                assert stand_in[place] == stand[0] and stand_in.get(stand[0], cell) == cell
    assert rare > 0


def test_exchanged_cells_come_from_anywhere_in_the_slide(simulated, centres):
    """As far from the centre as any pair of cells of a domain, where real neighbours are next to it."""
    context = Context(simulated, K, exchanged_within=("domain",))
    xy = np.stack([simulated.column("x"), simulated.column("y")], axis=1)
    spatial = centres[np.isfinite(xy[centres, 0])]
    places, shown = (xy[cells] for cells in context.members(spatial))
    near, far = (np.linalg.norm(at[:, 1:] - at[:, :1], axis=-1).mean() for at in (places, shown))
    slide, domain = simulated.slide_of(spatial), simulated.labels("domain", spatial)[0]
    pairs = (slide[:, None] == slide) & (domain[:, None] == domain)
    apart = np.linalg.norm(xy[spatial][:, None] - xy[spatial][None], axis=-1)[pairs].mean()
    assert near < 0.3 * apart and far > 0.9 * apart


def test_neither_other_slides_nor_other_centres_change_an_exchange(simulated, centres, tmp_path):
    context = Context(simulated, K, exchanged_within=("domain",))
    _, shown = context.members(centres)
    for some in (centres[::-1][:40], centres[7:8]):
        rows = [centres.tolist().index(cell) for cell in some]
        again = Context(simulated, K, exchanged_within=("domain",)).members(some)[1]
        assert np.array_equal(again, shown[rows])
    file = Path(simulated.path).parent / "slide1.h5ad"
    source = Source(str(file), "human", "simscope", labels=("domain",))
    build_corpus(tmp_path / "alone", [source], n_neighbours=12)
    alone = Context(Corpus.open(tmp_path / "alone"), K, exchanged_within=("domain",))
    here = np.arange(300, 600)
    assert np.array_equal(alone.members(here - 300)[1] + 300, context.members(here)[1])
    # Slides are drawn apart: equal ones would be exchanged alike.
    assert not np.array_equal(context.members(here)[1] - 300, context.members(here + 300)[1] - 600)


def test_random_cycles_go_through_every_class_once():
    rng = np.random.default_rng(0)
    classes = np.stack([rng.integers(-1, 3, 200), rng.integers(0, 4, 200)]).astype(np.int32)
    classes[:, 17] = 9  # alone
    classes[:, [3, 90]] = 8  # two of a kind
    following = random_cycles(classes, rng)
    for kind in set(zip(*classes.tolist())):
        members = np.flatnonzero((classes == np.array(kind)[:, None]).all(axis=0)).tolist()
        walk, cell = [], members[0]
        for _ in members:
            walk.append(cell)
            cell = int(following[cell])
        assert sorted(walk) == members and cell == members[0]
    assert following[17] == 17 and following[3] == 90 and following[90] == 3


def test_random_cycles_are_drawn_evenly():
    """Of 24 alike, each other follows the first as often as any."""
    rng, alike = np.random.default_rng(0), np.zeros((1, 24), np.int32)
    counts = np.bincount([random_cycles(alike, rng)[0] for _ in range(2_300)], minlength=24)
    assert counts[0] == 0 and chisquare(counts[1:]).pvalue > 1e-3


def test_without_neighbours_both_controls_mean_nothing(simulated, centres):
    places, shown = Context(simulated, 0, skip_nearest=99, exchanged_within=("nothing",)).members(centres)
    assert shown is places and np.array_equal(places, centres[:, None])


def test_bad_settings_name_the_field_and_the_mend(simulated, centres):
    with pytest.raises(InputError, match=r"exchanged_within names 'type', no label .*; use one of domain, "):
        Context(simulated, 1, exchanged_within=("domain", "type"))
    with pytest.raises(InputError, match="k is 13, the corpus stores 12 neighbours"):
        Context(simulated, 8, skip_nearest=5).members(centres)

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from eight_devices import on_eight_devices
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from scfm_jax.errors import InputError
from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.scaling.estimate import learning_of
from scfm_jax.scaling.workload import Cells, make_workload
from scfm_jax.training.config import MeshConfig, RunConfig, load_recipe
from scfm_jax.training.mesh import batch_sharding, make_mesh, parameter_shardings
from scfm_jax.training.metrics import CLOCKED, read_metrics
from scfm_jax.training.step import Program, make_program

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "experiments").glob("*.py") if path.stem != "__init__"
)


def abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
    return AbstractMesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def program_of(path: Path, mesh: AbstractMesh) -> Program:
    """Of a recipe, with a batch that the mesh divides."""
    config = load_recipe(path)
    config = replace(config, data=replace(config.data, batch_size=64 * config.data.virtual_shards))
    cells = Cells()
    learning = learning_of(config, make_workload(config, cells).n_genes)
    return make_program(config, mesh, learning)  # type: ignore[arg-type]


EIGHT = abstract_mesh((2, 2, 2))
PUBLISHED = TissueConfig(
    encoder=TransformerConfig(layers=12, heads=8, width=512),
    decoder=TransformerConfig(layers=4, heads=8, width=512),
)


def test_parameters_lie_where_their_names_say() -> None:
    _, shapes, names = abstract(lambda rngs: TissueModel(PUBLISHED, 19_264, rngs=rngs))
    places = jax.tree.map(lambda place: place.spec, parameter_shardings(EIGHT, shapes, names))
    block = places["encoder"]["blocks"]
    assert places["gene_embedding"]["table"] == PartitionSpec("tensor", "fsdp")
    assert block["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert block["output"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert block["up"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert block["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert block["up"]["bias"] == PartitionSpec(None, "tensor")
    assert block["attention_norm"]["scale"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 64, 1)], ids=str)
def test_no_large_parameter_stays_replicated(path: Path, shape: tuple[int, int, int]) -> None:
    """Over 1 MiB, nothing is whole on any device, nor are its moments."""
    like = program_of(path, abstract_mesh(shape)).like
    for path_of_leaf, leaf in jax.tree.leaves_with_path(like):
        share = np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size
        told = (jax.tree_util.keystr(path_of_leaf), leaf.shape, leaf.sharding.spec)
        assert leaf.size * leaf.dtype.itemsize <= 1 << 20 or share <= 1 / shape[1], told


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shardings_are_what_their_golden_text_says(path: Path) -> None:
    """On data 2 x fsdp 2 x tensor 2; SCFM_UPDATE_GOLDEN=1 writes the text anew."""
    config = load_recipe(path)
    batch = make_workload(config, Cells()).batch(type(config.model))
    tree = {**program_of(path, EIGHT).like, "batch": batch}
    lines = []
    for where, leaf in jax.tree.leaves_with_path(tree):
        place = batch_sharding(EIGHT) if where[0].key == "batch" else leaf.sharding
        spec = ", ".join(str(axis) for axis in place.spec)
        name = "/".join(
            str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in where
        )
        lines.append(f"{name} {leaf.dtype}{list(leaf.shape)} ({spec})\n")
    text, golden = "".join(lines), GOLDEN / f"{path.stem}.shardings.txt"
    if os.environ.get("SCFM_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.is_file(), f"no golden text of {path.name}: run this test with SCFM_UPDATE_GOLDEN=1"
    assert text == golden.read_text()


def test_no_golden_text_outlives_its_recipe() -> None:
    kept = {path.name.split(".")[0] for path in GOLDEN.glob("*.shardings.txt")}
    assert kept == {path.stem for path in RECIPES}


def test_what_the_mesh_does_not_divide_is_not_split() -> None:
    shapes = {
        "odd": jax.ShapeDtypeStruct((3, 5, 8), np.float32),
        "even": jax.ShapeDtypeStruct((4, 8), np.float32),
    }
    names = {"odd": ("layers", "embed", "mlp"), "even": ("embed", None)}
    places = parameter_shardings(EIGHT, shapes, names)
    assert places["odd"].spec == PartitionSpec(None, None, "tensor")
    assert places["even"].spec == PartitionSpec("fsdp", None)


def test_mesh_takes_all_devices_or_says_why_not() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    with pytest.raises(InputError, match="mesh: data x fsdp x tensor = 2 x 3 x 1 is not 1 devices"):
        make_mesh(MeshConfig(data=2, fsdp=3), jax.devices()[:1])


@pytest.mark.parametrize(("batch", "parts"), [(8, 4), (6, 1)])
def test_a_batch_gives_every_shard_the_same_or_says_why_not(batch: int, parts: int) -> None:
    config = load_recipe(next(path for path in RECIPES if path.stem == "tissue_real"))
    config = replace(
        config,
        data=replace(config.data, batch_size=batch),
        optimiser=replace(config.optimiser, accumulation=parts),
    )
    told = rf"data.batch_size: {batch} is not a multiple of data x fsdp x accumulation = 2 x 2 x {parts}; "
    with pytest.raises(InputError, match=told + rf"set it to a multiple of {4 * parts}"):
        make_program(config, EIGHT, learning_of(config, 100))  # type: ignore[arg-type]


LOSSES = """
import json, sys
import jax
import numpy as np
from scfm_jax.corpus import Corpus
from scfm_jax.training.config import MeshConfig, RunConfig, from_dict
from scfm_jax.training.mesh import make_mesh
from scfm_jax.training.step import make_program
from scfm_jax.training.task import make_task
from scfm_jax.training.train import to_devices

config, shapes = from_dict(RunConfig, json.loads(sys.argv[1]), "test"), json.loads(sys.argv[2])
assert len(jax.devices()) == 8
corpus = Corpus.open(config.corpus)
task = make_task(config, corpus)
batches = list(task.loader(np.arange(corpus.n_cells), (0, 1)).iterate(0, 20))
for shape in shapes:
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    program = make_program(config, mesh, task)
    state, losses = program.fresh(), []
    for batch in batches:
        state, sums = program.step(state, to_devices(batch, mesh), program.given(len(losses)))
        losses.append(float(sums["loss"]) / float(sums["weight"]))
    print(json.dumps(losses))
"""
ONE, CUBE = (1, 1, 1), (2, 2, 2)
ALL = [ONE, (8, 1, 1), (1, 8, 1), (1, 4, 2), CUBE]


@pytest.mark.parametrize(
    ("family", "meshes"),
    [
        ("ranks", [ONE, CUBE]),
        pytest.param("ranks", ALL, marks=pytest.mark.slow),
        pytest.param("config", ALL, marks=pytest.mark.slow),
    ],
    ids=["nicheformer, 2 x 2 x 2", "nicheformer", "tissue"],
)
def test_losses_of_twenty_steps_do_not_depend_on_the_mesh(
    family: str, meshes: list[tuple[int, int, int]], request: pytest.FixtureRequest
) -> None:
    run: RunConfig = request.getfixturevalue(family)
    told = on_eight_devices(LOSSES, json.dumps(dataclasses.asdict(run)), json.dumps(meshes))
    one, *others = np.array([json.loads(line) for line in told])
    assert len(one) == 20 and one[-1] < one[0]
    for shape, losses in zip(meshes[1:], others, strict=True):
        np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=str(shape))


RUN = """
import json, sys
from pathlib import Path
import jax
from scfm_jax.training.config import RunConfig, from_dict
from scfm_jax.training.train import train
config, folder = sys.argv[1:]
assert len(jax.devices()) == 8
train(from_dict(RunConfig, json.loads(config), "test"), Path(folder), report=lambda row: print(row))
"""


@pytest.mark.slow
def test_eight_devices_train_like_one(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    """The schedule and the batches of the run on one device, on 2 x 2 x 2 simulated ones."""
    run = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    on_eight_devices(RUN, json.dumps(dataclasses.asdict(run)), str(tmp_path / "eight"))
    rows = {"one": finished, "eight": tmp_path / "eight"}
    of_one, of_eight = (read_metrics(folder / "metrics.jsonl") for folder in rows.values())
    assert len(of_one) == len(of_eight) == 9
    for one, eight in zip(of_one, of_eight, strict=True):
        assert one.keys() == eight.keys()
        for name in one.keys() - CLOCKED:
            if isinstance(one[name], dict):  # cells of each kind of slide
                assert eight[name] == one[name]
                continue
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, err_msg=f"{name} {one['step']}")

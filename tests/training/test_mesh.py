from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from scfm_jax.errors import InputError
from scfm_jax.models.functional import abstract
from scfm_jax.models.tissue import TissueConfig, TissueModel
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import MeshConfig, RunConfig
from scfm_jax.training.mesh import make_mesh, parameter_shardings
from scfm_jax.training.metrics import CLOCKED, read_metrics

EIGHT = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
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


def test_no_large_parameter_stays_replicated() -> None:
    _, shapes, names = abstract(lambda rngs: TissueModel(PUBLISHED, 19_264, rngs=rngs))
    places = parameter_shardings(EIGHT, shapes, names)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        place = places
        for key in path:
            place = place[key.key]
        share = np.prod(place.shard_shape(leaf.shape)) / leaf.size
        assert leaf.size <= 20_000 or share <= 0.5, (jax.tree_util.keystr(path), place.spec)
        assert leaf.size <= 1_000_000 or share == 0.25, (jax.tree_util.keystr(path), place.spec)


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
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(dataclasses.asdict(run)), str(tmp_path / "eight")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {"one": finished, "eight": tmp_path / "eight"}
    of_one, of_eight = (read_metrics(folder / "metrics.jsonl") for folder in rows.values())
    assert len(of_one) == len(of_eight) == 9
    for one, eight in zip(of_one, of_eight, strict=True):
        assert one.keys() == eight.keys()
        for name in one.keys() - CLOCKED:
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, err_msg=f"{name} {one['step']}")

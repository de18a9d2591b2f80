from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scfm_jax.cli import main
from scfm_jax.data.loader import DataConfig
from scfm_jax.data.ranks import RankConfig
from scfm_jax.models.flops import Load, forward_flops
from scfm_jax.models.nicheformer import NicheformerConfig
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.objectives.masked_genes import MaskedGenesConfig
from scfm_jax.scaling.estimate import activation_bytes
from scfm_jax.scaling.plan import Plan, Traffic, _executed_flops, make_plan
from scfm_jax.scaling.topology import Topology
from scfm_jax.scaling.workload import Cells, make_workload
from scfm_jax.scaling_verbs import _lines
from scfm_jax.training.config import MeshConfig, OptimiserConfig, RunConfig, load_recipe, override
from scfm_jax.training.hardware import ACCELERATORS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LAYERS, WIDTH, HIDDEN, LENGTH, GENES = 3, 64, 128, 256, 98
RUN = RunConfig(
    name="small",
    model=NicheformerConfig(
        layers=LAYERS, heads=2, width=WIDTH, hidden=HIDDEN, positions=LENGTH, dtype="bfloat16", remat="full"
    ),
    data=DataConfig(sample=RankConfig(length=LENGTH), batch_size=64, virtual_shards=4, length_multiple=128),
    objective=MaskedGenesConfig(),
)
CELLS = Cells(vocabulary=GENES)


def plan(config: RunConfig = RUN, topology: str = "h100:4x8", **more: Any) -> Plan:
    return make_plan(config, Topology.parse(topology), CELLS, **more)


def with_mesh(fsdp: int = 1, tensor: int = 1) -> RunConfig:
    return replace(RUN, mesh=MeshConfig(fsdp=fsdp, tensor=tensor))


def test_state_and_gathers_of_a_mesh_by_hand() -> None:
    """Matrices in eighths over fsdp; each gathered twice in bf16, its gradient scattered once."""
    made = plan(with_mesh(fsdp=8))
    assert made.mesh == {"data": 4, "fsdp": 8, "tensor": 1}
    layer = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    tables = (256 + LENGTH + 128) * WIDTH
    matrices = LAYERS * layer + tables
    split_vectors = LAYERS * (2 * WIDTH + 4 * WIDTH)  # biases of output and down, two norms
    whole_vectors = LAYERS * (3 * WIDTH + HIDDEN) + 128
    assert made.parameters == matrices + split_vectors + whole_vectors
    assert made.parameter_bytes == 4 * ((matrices + split_vectors) // 8 + whole_vectors)
    assert 0 <= made.optimiser_bytes - 2 * made.parameter_bytes <= 64  # the moments, and counts of steps
    sent = {(each.kind, each.over): each.sent for each in made.traffic}
    gathered = 2 * (matrices + split_vectors)
    assert sent["all-gather", "fsdp"] == 2 * gathered * 7 / 8
    assert sent["reduce-scatter", "fsdp"] == gathered * 7 / 8
    assert sent["all-reduce", "data"] == 2 * (gathered / 8 + 2 * whole_vectors) * 3 / 4
    # Eight GPUs behind one switch; the data axis goes out of the host.
    seconds = {(each.kind, each.over): each.seconds for each in made.traffic}
    gpu = ACCELERATORS["h100"]
    assert seconds["all-gather", "fsdp"] == pytest.approx(sent["all-gather", "fsdp"] / gpu.link)
    assert seconds["all-reduce", "data"] == pytest.approx(sent["all-reduce", "data"] / gpu.network)
    assert made.network_seconds == pytest.approx(sum(seconds.values()))


def test_a_tensor_axis_sums_activations() -> None:
    """Two sums forwards and two backwards a layer, two more where it is computed again."""
    (sums,) = (each for each in plan(with_mesh(tensor=2)).traffic if each.over == "tensor")
    rows = 64 // 16
    assert (sums.kind, sums.count) == ("all-reduce", 6 * LAYERS)
    assert sums.sent == 6 * LAYERS * rows * LENGTH * WIDTH * 2 * (2 * 1 / 2)


def test_operations_by_hand() -> None:
    made, peak = plan(), ACCELERATORS["h100"].peak_flops
    parts = forward_flops(RUN.model, GENES, Load.padded(64, LENGTH, made.lengths[1]))
    assert made.flops == 3 * sum(parts.values())
    assert made.tokens == 64 * LENGTH
    # remat "full" computes layers again, and cuDNN's backward pass the scores once more.
    done = 4 * parts["layers"] + 4.5 * parts["attention"] + 3 * parts["head"]
    assert made.compute_seconds == pytest.approx(done / 32 / peak)
    longest = max(made.compute_seconds, made.memory_seconds, made.network_seconds)
    assert made.share_of_peak == pytest.approx(made.flops / 32 / peak / longest)
    assert getattr(made, f"{made.limit}_seconds") == longest


def test_dots_computes_an_attention_of_xla_again_and_no_kernels() -> None:
    for attention, passes in (("plain", 3 + 1), ("cudnn", 3.5)):
        made = plan(replace(RUN, model=replace(RUN.model, remat="dots", attention=attention)))
        parts = forward_flops(RUN.model, GENES, Load.padded(64, LENGTH, made.lengths[1]))
        done = 3 * parts["layers"] + passes * parts["attention"] + 3 * parts["head"]
        assert made.compute_seconds == pytest.approx(done / 32 / ACCELERATORS["h100"].peak_flops)


def test_heads_narrower_than_the_matrix_unit_cost_each_stack_its_own() -> None:
    """On a v5p, 128 wide: whole heads in the encoder, and a quarter of the unit in the decoder."""
    encoder, decoder = TransformerConfig(layers=2, heads=2, width=256), TransformerConfig(1, 8, 256)
    run = replace(load_recipe(EXPERIMENTS / "tissue_3m.py"), model=TissueConfig(encoder, decoder))
    work, topology = make_workload(run, Cells()), Topology.parse("v5p:4x4x4")
    parts = forward_flops(run.model, work.n_genes, work.load)
    both, decoders = parts["attention"], 2 * 2 * 256 * work.load.second_pairs
    done = 3 * sum(parts[name] for name in ("embedding", "layers", "head"))
    done += 4.5 * (both - decoders + 4 * decoders)
    assert _executed_flops(run, topology, work, "splash") == pytest.approx(done)


def test_what_is_kept_for_the_backward_pass_by_hand() -> None:
    """With remat "full" the inputs of the layers, in bf16; the rest does not grow with depth."""
    work = make_workload(RUN, CELLS)
    deep, deeper = (replace(RUN, model=replace(RUN.model, layers=layers)) for layers in (12, 24))
    of_inputs = 12 * LENGTH * WIDTH * 2
    assert activation_bytes(deeper, work, 5) - activation_bytes(deep, work, 5) == pytest.approx(
        5 * of_inputs, rel=0.01
    )
    dots = replace(RUN, model=replace(RUN.model, remat="dots"))
    none = replace(RUN, model=replace(RUN.model, remat="none"))
    full, dots_bytes, none_bytes = (activation_bytes(each, work, 5) for each in (RUN, dots, none))
    assert full < dots_bytes < none_bytes
    # Projections (three, output), up and down, and the attention's output.
    of_products = LAYERS * LENGTH * (6 * WIDTH + HIDDEN) * 2
    assert dots_bytes - full == pytest.approx(5 * of_products, rel=0.25)


def test_a_small_batch_is_raised_and_said() -> None:
    made = plan(replace(RUN, data=replace(RUN.data, batch_size=8)), "h100:8x8")
    assert made.batch == 64
    assert made.changes == (
        "data.batch_size 8 -> 64 (one sample for each data x fsdp shard and microbatch)",
        "data.virtual_shards 4 -> 8 (each host reads its own)",
    )
    assert made.flags == ("--data.batch_size 64", "--data.virtual_shards 8")
    assert plan().changes == ()
    with pytest.raises(ValueError, match="64 is not a multiple of data x fsdp x accumulation = 128 x 1 x 1"):
        plan(topology="h100:16x8", batch=64)


def test_hosts_that_a_tensor_axis_spans_read_the_same_rows() -> None:
    made = plan(with_mesh(tensor=16), "h100:16x8", batch=8)
    assert made.flags == ("--data.batch_size 8", "--data.virtual_shards 8")


def test_microbatches_hold_the_sum_of_their_gradients_beside_their_own() -> None:
    """As many samples at a time, and nothing else but one more array of every parameter's shape."""
    once, twice = plan(), plan(replace(RUN, optimiser=OptimiserConfig(accumulation=2)), batch=128)
    assert twice.total_bytes - once.total_bytes == once.parameter_bytes


def test_a_given_batch_is_taken() -> None:
    made = plan(batch=128)
    assert (made.batch, made.changes) == (128, ("data.batch_size 64 -> 128",))


@pytest.mark.parametrize(
    ("config", "batch", "tries"),
    [
        (with_mesh(), 1 << 21, ("--optimiser.accumulation", "--model.remat")),
        (replace(RUN, model=replace(RUN.model, width=65_536)), 32, ("--mesh.fsdp", "--mesh.tensor")),
    ],
    ids=["activations", "state"],
)
def test_what_does_not_fit_says_what_to_change(config: RunConfig, batch: int, tries: tuple[str, ...]) -> None:
    config = replace(config, model=replace(config.model, remat="full" if batch == 32 else "dots"))
    made = plan(config, batch=batch)
    assert not made.fits
    assert tuple(mend.split()[0] for mend in made.mends) == tries


def test_accumulation_that_is_advised_is_enough() -> None:
    made = plan(replace(RUN, model=replace(RUN.model, remat="dots")), batch=1 << 22)
    assert not made.fits
    parts = int(made.mends[0].split()[1])
    again = replace(
        RUN, model=replace(RUN.model, remat="dots"), optimiser=OptimiserConfig(accumulation=parts)
    )
    assert plan(again, batch=1 << 22).fits


@pytest.mark.parametrize("data", [0, 32])
def test_a_tensor_axis_that_is_advised_is_a_mesh_and_makes_it_smaller(data: int) -> None:
    config = replace(RUN, model=replace(RUN.model, width=65_536), mesh=MeshConfig(data=data))
    made = plan(config, batch=32)
    words = next(mend for mend in made.mends if "tensor" in mend).partition(" (")[0].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    batch = int(flags.pop("--batch"))
    again = override(config, [f"{name}={value}" for name, value in flags.items()], "flags")
    assert plan(again, batch=batch).total_bytes < 0.6 * made.total_bytes


def test_a_long_kind_of_collective_keeps_its_distance() -> None:
    made = replace(plan(), traffic=(Traffic("collective-permute", "fsdp", 36, 1e6, 1e-3),))
    assert "  collective-permute  36 over fsdp: 1.0 MB from a chip, 1.00 ms" in _lines(made, EXPERIMENTS, ())


def test_where_no_flag_helps_the_advice_is_more_devices() -> None:
    config = replace(with_mesh(fsdp=8), model=replace(RUN.model, width=65_536))
    (mend,) = plan(config, "h100:1x8", batch=8).mends
    assert mend == "a --topology of more devices, or shorter samples"


def test_lengths_of_tissue_are_those_of_the_cells() -> None:
    config = load_recipe(EXPERIMENTS / "tissue_1b.py")
    work = make_workload(config, Cells(expressed=150, panel=377))
    assert (work.first, work.second) == (5_120, 384)  # 33 x 152 = 5,016 and 379, in multiples of 128
    assert work.batch(type(config.model)).static_lengths == (5_120, 384)
    every = replace(config.data, sample=replace(config.tissue()[1], decoder="vocabulary"), length_multiple=8)
    assert make_workload(replace(config, data=every), Cells()).second == 19_272


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_prints_a_plan_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(EXPERIMENTS / "nicheformer_small.py")
    status, text, _ = run(capsys, recipe, "--topology", "h100:1x8", "--mesh.tensor", "2")
    assert status == 0
    assert "data 4 x fsdp 1 x tensor 2" in text and "of peak" in text
    assert f"scfm train {recipe} RUN --corpus CORPUS --mesh.tensor 2" in text
    status, text, _ = run(capsys, recipe, "--topology=h100:1x8", "--json", "--batch=64")
    told = json.loads(text)
    assert status == 0 and told["fits"] and told["batch"] == 64
    assert told.keys() - {"fits"} == {field.name for field in dataclasses.fields(Plan)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--topology", "h100:0x8"], "--topology: 'h100:0x8' does not give"),
        (["--topology", "h100:1x8", "--mesh.fsdp", "3"], "mesh: data x fsdp x tensor = 2 x 3 x 1 is not 8"),
        (["--topology", "h100:1x8", "--batch", "7"], "data.batch_size: 7 is not a multiple of data x fsdp"),
        (["--topology", "h100:1x8", "--batch", "-1"], "--batch: -1 is no number of samples"),
        (["--topology", "h100:1x8", "--panel", "0"], "--panel: 0 is no number of genes; give more"),
        (["--topology", "h100:1x8", "--mesh.pipeline", "2"], "has no field 'mesh.pipeline'"),
        (["--topology", "h100:1x8", "--model.attention", "splash"], "model.attention: splash runs on TPUs"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, said = run(capsys, str(EXPERIMENTS / "nicheformer_small.py"), *words)
    assert status == 2
    assert told in said and said.count("\n") == 1


def test_status_1_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, str(EXPERIMENTS / "tissue_1b.py"), "--topology", "h100:1x8")
    assert status == 1
    assert "DOES NOT FIT" in text and "--optimiser.accumulation" in text


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the compiler of TPUs: pip install '.[tpu]'")
@pytest.mark.parametrize("name", ["tissue_1b", "nicheformer_1b"])
def test_a_billion_parameters_fit_64_chips(name: str) -> None:
    """Compiled; and what shapes alone say of the same step is near."""
    config, topology = load_recipe(EXPERIMENTS / f"{name}.py"), Topology.parse("v5p:4x4x4")
    compiled = make_plan(config, topology, Cells())
    assert compiled.fits and compiled.compiled and compiled.changes == ()
    assert 0.95e9 < compiled.parameters < 1.05e9
    reckoned = make_plan(config, Topology.parse("h100:8x8"), Cells())
    assert reckoned.parameter_bytes == compiled.parameter_bytes
    assert reckoned.flops == compiled.flops
    assert reckoned.total_bytes == pytest.approx(compiled.total_bytes, rel=0.25)
    gathers = [
        sum(each.sent for each in made.traffic if each.kind == "all-gather") for made in (compiled, reckoned)
    ]
    assert gathers[0] == pytest.approx(gathers[1], rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the compiler of TPUs: pip install '.[tpu]'")
def test_what_the_compiler_refuses_says_how_much_it_takes() -> None:
    config = load_recipe(EXPERIMENTS / "tissue_1b.py")
    made = make_plan(config, Topology.parse("v5e:4x4"), Cells())
    assert not made.fits and made.total_bytes > made.parameter_bytes + made.optimiser_bytes
    assert made.mends[0].startswith("--optimiser.accumulation ")
    assert made.memory_seconds is made.network_seconds is made.share_of_peak is None

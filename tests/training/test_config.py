from __future__ import annotations

import dataclasses
import json
import os
import reprlib
from pathlib import Path
from typing import Any

import pytest

from scfm_jax.errors import InputError
from scfm_jax.models.tissue import TissueConfig
from scfm_jax.models.transformer import TransformerConfig
from scfm_jax.training.config import RunConfig, from_dict, load_recipe, override

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "experiments").glob("*.py") if path.stem != "__init__"
)
CONFIG = RunConfig(
    name="small",
    model=TissueConfig(
        encoder=TransformerConfig(layers=2, heads=1, width=16),
        decoder=TransformerConfig(layers=1, heads=1, width=8),
    ),
)


def at(config: RunConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("flags", "path", "value"),
    [
        (["--seed", "7"], "seed", 7),
        (["--model.encoder.layers=6"], "model.encoder.layers", 6),
        (["--data.sample.neighbours", "0"], "data.sample.neighbours", 0),
        (["--data.batch-size", "64"], "data.batch_size", 64),
        (["--optimiser.peak_rate", "1"], "optimiser.peak_rate", 1.0),
        (["--optimiser.peak_rate", "1e-3"], "optimiser.peak_rate", 0.001),
        (["--corpus", "out/corpus"], "corpus", "out/corpus"),
        (["--corpus=a=b"], "corpus", "a=b"),
        (["--corpus", "2024"], "corpus", "2024"),
        (["--technologies", "2024"], "technologies", ("2024",)),
        (["--technologies", "merfish"], "technologies", ("merfish",)),
        (["--technologies", "merfish,cosmx"], "technologies", ("merfish", "cosmx")),
        (["--technologies", '["merfish", "cosmx"]'], "technologies", ("merfish", "cosmx")),
        (["--split.held_out", "*/animal18*"], "split.held_out", ("*/animal18*",)),
        (["--objective.loss", "nb"], "objective.loss", "nb"),
        (["--objective.target_sum", "median"], "objective.target_sum", "median"),
        (["--objective.target_sum", "500"], "objective.target_sum", 500.0),
        (["--objective.depth_floor", "null"], "objective.depth_floor", None),
        (["--model.encoder.hidden", "24"], "model.encoder.hidden", 24),
        (["--model.remat", "full"], "model.remat", "full"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_a_flag_changes_its_field_and_no_other(flags: list[str], path: str, value: Any) -> None:
    changed = override(CONFIG, flags, "flags")
    assert at(changed, path) == value
    assert type(at(changed, path)) is type(value)

    def put(config: Any, names: list[str]) -> Any:
        inner = put(getattr(config, names[0]), names[1:]) if len(names) > 1 else value
        return dataclasses.replace(config, **{names[0]: inner})

    assert changed == put(CONFIG, path.split("."))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sead", "7"], r"has no field 'sead'; did you mean 'seed'\?"),
        (["--model.encodr.layers", "7"], r"'model.encodr.layers'; did you mean 'encoder'\?"),
        (["--mesh.zzzzzz", "7"], r"'mesh.zzzzzz'; there are data, fsdp, tensor"),
        (["--seed.x", "7"], r"has no field 'seed.x'; it ends before that name"),
        (["--seed"], r"cannot read '--seed'; write --field.name value"),
        (["seed", "7"], r"cannot read 'seed'"),
        (["--seed", "half"], r"'seed' cannot be 'half'; give int"),
        (["--seed", "1.5"], r"'seed' cannot be 1.5; give int"),
        (["--seed", "-1"], r"seed: -1 is not a 32-bit number"),
        (["--seed", "4294967296"], r"seed: 4294967296 is not a 32-bit number"),
        (["--seed", "true"], r"'seed' cannot be True; give int"),
        (["--seed", "[" * 100_000], r"'seed' cannot be '\[+...\[+'; give int"),
        (["--seed", "1" * 5_000], r"'seed' cannot be '1+...1+'; give int"),
        (["--optimiser.peak_rate", "1" * 400], r"optimiser: peak_rate is inf, not a number from 0"),
        (["--optimiser.peak_rate", "true"], r"'optimiser.peak_rate' cannot be True; give float"),
        (["--model.remat", "1"], r"'model.remat' cannot be 1; give 'none' or 'dots' or 'full'"),
        (["--objective.loss", "msee"], r"'objective.loss' cannot be 'msee'; give 'mse' or 'poisson' or 'nb'"),
        (
            ["--objective.target_sum", "mean"],
            r"'objective.target_sum' cannot be 'mean'; give float or 'median'",
        ),
        (["--model.encoder.hidden", "x"], r"'model.encoder.hidden' cannot be 'x'; give int or null"),
        (["--model", "3"], r"'model' cannot be 3; give TissueConfig"),
        (["--data.virtual_shards", "5"], r"data.virtual_shards: 5 does not divide data.batch_size, 32"),
        (["--optimiser.accumulation", "5"], r"optimiser.accumulation: 5 does not divide data.batch_size, 32"),
        (["--model.encoder.heads", "3"], r"model.encoder.*multiple of 4 x heads"),
        (["--mesh.fsdp", "0"], r"mesh: fsdp is 0, not a number from 1"),
        # Two of them multiply to devices that there may be.
        (["--mesh.data", "-1", "--mesh.fsdp", "-8"], r"mesh: data is -1, not a number from 0"),
        (["--mesh.fsdp", "-1", "--mesh.tensor", "-8"], r"mesh: fsdp is -1, not a number from 1"),
    ],
    ids=reprlib.repr,
)
def test_a_wrong_flag_is_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        override(CONFIG, flags, "small.py")
    assert "\n" not in str(error.value)


def test_config_survives_json() -> None:
    config = override(CONFIG, ["--technologies", "a,b", "--objective.depth_floor", "null"], "flags")
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_dict(RunConfig, content, "config.json") == config


def test_stored_config_must_be_whole_and_known() -> None:
    content = dataclasses.asdict(CONFIG)
    with pytest.raises(
        InputError, match=r"config.json: has no field 'model.encoder.widht'; did you mean 'width'\?"
    ):
        encoder = {**content["model"]["encoder"], "widht": 3}
        from_dict(RunConfig, {**content, "model": {**content["model"], "encoder": encoder}}, "config.json")
    with pytest.raises(InputError, match=r"lacks the field 'model.encoder'; add it"):
        from_dict(RunConfig, {**content, "model": {"decoder": content["model"]["decoder"]}}, "config.json")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_what_its_golden_text_says(path: Path) -> None:
    """SCFM_UPDATE_GOLDEN=1 writes the text anew, for a change that is meant."""
    text = json.dumps(dataclasses.asdict(load_recipe(path)), indent=2) + "\n"
    golden = GOLDEN / f"{path.stem}.json"
    if os.environ.get("SCFM_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"no golden text of {path.name}: run this test with SCFM_UPDATE_GOLDEN=1"
    assert text == golden.read_text()
    assert from_dict(RunConfig, json.loads(text), str(golden)) == load_recipe(path)


def test_no_golden_text_outlives_its_recipe() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such recipe; name a Python file"),
        ("x = 1", "define recipe"),
        ("def recipe(:", "invalid syntax"),
        ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
        (
            "from scfm_jax.training.config import RunConfig\n\ndef recipe():\n    return RunConfig(sead=1)",
            "unexpected keyword argument 'sead'; mend that field",
        ),
        ("x = unknown", "NameError: name 'unknown' is not defined; mend the recipe"),
        ("def recipe():\n    return {}['x']", "KeyError: 'x'; mend the recipe"),
        (
            "def recipe():\n    return 3",
            r"recipe\(\) returns int; return a scfm_jax.training.config.RunConfig",
        ),
    ],
    ids=["no file", "no function", "syntax", "import", "unknown field", "name", "key", "no config"],
)
def test_a_wrong_recipe_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_of_another_kind_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("seed = 1")
    with pytest.raises(InputError, match=r"recipe\.toml: is no Python file; name a Python file"):
        load_recipe(path)

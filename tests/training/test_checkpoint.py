from __future__ import annotations

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scfm_jax.errors import InputError
from scfm_jax.training.checkpoint import Checkpoints, abstract_state

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step: int, width: int = 3) -> dict[str, jax.Array]:
    return {
        "weights": jnp.arange(width, dtype=jnp.float32) / (step + 3),
        "step": jnp.asarray(step, jnp.int32),
    }


def like(width: int = 3) -> dict[str, jax.ShapeDtypeStruct]:
    return abstract_state(state(0, width), {"weights": HERE, "step": HERE})


def test_the_best_and_the_last_stay(tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.2, 3: None, 4: 0.5, 5: None, 6: 0.8}
    with Checkpoints(tmp_path, keep_last=2, keep_best=1) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state(step), held_out_loss=loss)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5, 6]
    with Checkpoints(tmp_path) as again:
        assert (again.best, again.latest) == (2, 6)
        for step in (2, 6):
            back = again.restore(step, like())
            jax.tree.map(np.testing.assert_array_equal, back, state(step))
            assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, state(step))


def test_without_a_measure_the_newest_is_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest is None and checkpoints.best is None
        checkpoints.save(4, state(4))
        checkpoints.save(4, state(9))  # there already: left as it is
    with Checkpoints(tmp_path / "checkpoints") as again:
        assert (again.best, again.latest) == (4, 4)
        np.testing.assert_array_equal(again.restore(4, like())["weights"], state(4)["weights"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_restored_is_one_line(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(4))
    with Checkpoints(tmp_path) as again:
        for step, shape in ((4, like(5)), (5, like())):
            with pytest.raises(InputError, match=f"checkpoint {step} cannot be restored") as error:
                again.restore(step, shape)
            assert "\n" not in str(error.value)
    gc.collect()  # Orbax complains once more when its failed reads are collected

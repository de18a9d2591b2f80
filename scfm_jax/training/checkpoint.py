"""Checkpoints of the training state (Orbax v1): asynchronous, the best and the last few kept."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from scfm_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that pending writes end.

    Parameters
    ----------
    folder
        ``checkpoints/`` of the run.
    keep_last, keep_best
        How many stay: the newest, and those of the lowest held-out loss.
    """

    def __init__(self, folder: Path, *, keep_last: int = 1, keep_best: int = 1) -> None:
        keep = ocp.training.preservation_policies
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=keep.AnyPreservationPolicy(
                [
                    keep.LatestN(keep_last),
                    keep.BestN(
                        get_metric_fn=lambda metrics: metrics["held_out_loss"],
                        reverse=True,
                        n=keep_best,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )
        newest = self._checkpointer.latest
        # Hosts must agree on what is saved, and need not see a finished write at the same time.
        self._newest = None if newest is None else newest.step

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the last write to end."""
        self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, if only begun to be written."""
        return self._newest

    @property
    def best(self) -> int | None:
        """Step of the lowest held-out loss; the newest where none was measured."""
        measured = [item for item in self._checkpointer.checkpoints if item.metrics]
        if not measured:
            return self.latest
        return min(measured, key=lambda item: item.metrics["held_out_loss"]).step

    def save(self, step: int, state: Any, *, held_out_loss: float | None = None) -> None:
        """Start to write the state after `step` steps; a step that is there already is left."""
        if self._newest == step:
            return
        self._newest = step
        metrics = None if held_out_loss is None else {"held_out_loss": held_out_loss}
        self._checkpointer.save_async(step, state, metrics=metrics)

    def restore(self, step: int, like: Any) -> Any:
        """The state after `step` steps, shaped and sharded as `like`, a tree of `jax.ShapeDtypeStruct`.

        Raises
        ------
        InputError
            It cannot be read, or another model wrote it.
        """
        try:
            return self._checkpointer.load(step, like)
        except (ValueError, KeyError, FileNotFoundError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(
                self._folder, f"checkpoint {step} cannot be restored ({reason})", "use the run's own config"
            ) from error


def abstract_state(state: Any, shardings: Any) -> Any:
    """`state` as shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings
    )

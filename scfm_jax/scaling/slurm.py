"""SLURM scripts for the runs of a sweep: job arrays, one run a job, the next stage behind the first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from scfm_jax.scaling.sweep_plan import PlannedRun

JOB, SUBMIT = "job.sh", "submit.sh"


def write_scripts(folder: Path, command: Sequence[str], planned: Sequence[PlannedRun]) -> Path:
    """Write ``job.sh``, which runs the run of its place in the array, and ``submit.sh``, which submits all.

    Parameters
    ----------
    folder
        Of the sweep, with a folder ``logs``.
    command
        Words that run the sweep where this is called, to which ``--index`` is added.
    planned
        In their order.

    Returns
    -------
    The script to call, with options of ``sbatch`` (partition, time, GPUs): what a site wants is not ours to
    guess.
    """
    job = [
        "#!/bin/bash",
        f"#SBATCH --output={shlex.quote(f'{folder.absolute()}/logs/%A_%a.log')}",
        "# A job that is stopped saves first, and goes on where it is started again.",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:TERM@120",
        f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
        f'srun {shlex.join(command)} --index "$SLURM_ARRAY_TASK_ID" &',
        "child=$!",
        "trap 'kill -TERM $child; wait $child' TERM",
        "wait $child",
    ]
    submit = ["#!/bin/bash", "# bash submit.sh [options of sbatch]", "set -euo pipefail"]
    place, held = 0, ""
    for generation, runs in groupby(planned, key=lambda each: each.generation):
        last = place + len(list(runs)) - 1
        array, path = f"--array={place}-{last}", shlex.quote(str(folder.absolute() / JOB))
        submit.append(f'wave{generation}=$(sbatch --parsable {array}{held} "$@" {path})')
        submit.append(f'echo "runs {place} to {last}: job $wave{generation}"')
        held = f' --dependency="afterok:$wave{generation}"'
        place = last + 1
    for name, lines in ((JOB, job), (SUBMIT, submit)):
        (folder / name).write_text("\n".join(lines) + "\n")
        (folder / name).chmod(0o755)
    return folder / SUBMIT

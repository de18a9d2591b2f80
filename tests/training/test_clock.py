"""Time that is split leaves nothing over, whatever the host and the devices do meanwhile."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import jax
import pytest

from scfm_jax.errors import InputError
from scfm_jax.training.clock import PURPOSES, Clock, Ledger, parse_steps, shares
from scfm_jax.training.config import RunConfig, override
from scfm_jax.training.metrics import read_metrics
from scfm_jax.training.train import train


class Device:
    """A device of one queue under a clock that only moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


class Result:
    """What a step returns before it is there; `jax.block_until_ready` waits for it."""

    def __init__(self) -> None:
        self.there = threading.Event()

    def block_until_ready(self) -> Result:
        assert self.there.wait(10)
        return self


def finish(clock: Clock, device: Device, result: Result, at: float) -> None:
    """The device's time passes until `at`, when `result` is there."""
    device.now = at
    result.there.set()
    clock.settle()


def test_idle_time_is_for_what_the_host_did_meanwhile() -> None:
    device = Device()
    clock = Clock(device.time)
    results = [Result() for _ in range(3)]
    steps = iter(results)

    def step(seconds: float) -> tuple[None, Result]:
        device.now += seconds
        return None, next(steps)

    device.now = 3.0  # the start
    clock.launch(step, 2.0, compiles=True)  # launched at 5
    finish(clock, device, results[0], 9.0)
    assert clock.take() == {**dict.fromkeys(PURPOSES, 0.0), "start": 3.0, "compile": 2.0, "compute": 4.0}

    with clock.spent("evaluation"):
        device.now = 12.0
    with clock.spent("data"):
        device.now = 13.0
    device.now = 13.5
    clock.launch(step, 0.0, compiles=False)
    # While the second step runs the host fetches the third: no idle time, so no data wait.
    with clock.spent("data"):
        device.now = 15.0
    clock.launch(step, 0.0, compiles=False)
    results[1].there.set()
    second = clock.take()
    assert second["evaluation"] == 3.0 and second["data"] == 1.0 and second["other"] == 0.5
    assert second["compute"] == 1.5
    finish(clock, device, results[2], 20.0)
    third = clock.take()
    assert third == {**dict.fromkeys(PURPOSES, 0.0), "compute": 5.0}
    with clock.spent("checkpoint"):
        device.now = 22.0
    rest = clock.rest()
    assert rest["checkpoint"] == 2.0 and sum(rest.values()) == 2.0


def test_waiting_for_items_is_for_data() -> None:
    device = Device()
    clock = Clock(device.time)

    def items():
        for number in range(2):
            device.now += 1.0
            yield number

    assert list(clock.waits(items())) == [0, 1]
    assert clock.rest()["data"] == 2.0


def test_a_ledger_tells_lost_from_down(tmp_path: Path) -> None:
    first = Ledger(tmp_path, [], 1_000.0)
    rows = [{"step": n, "seconds": {"compute": 2.0, "data": 1.0}} for n in (1, 2, 3)]
    for row in rows:
        first.add(row["seconds"])
    first.save()
    # Killed after step 3 at 1,009 s; resumed from step 1 at 1,100 s.
    second = Ledger(tmp_path, rows[1:], 1_100.0)
    second.add({"start": 5.0})
    second.add({"compute": 2.0, "data": 1.0})
    second.save()
    content = json.loads((tmp_path / "goodput.json").read_text())
    spent = {purpose: seconds for purpose, seconds in content["seconds"].items() if seconds}
    assert spent == {"compute": 4.0, "data": 2.0, "start": 5.0, "lost": 6.0, "down": 91.0}
    assert content["seen"] - content["started"] == sum(spent.values()) == 108.0
    assert content["starts"] == 2 and content["goodput"] == pytest.approx(4 / 108)
    assert sum(shares(content["seconds"]).values()) == pytest.approx(1.0)


def test_a_run_accounts_for_all_its_time(finished: Path) -> None:
    content = json.loads((finished / "goodput.json").read_text())
    assert content["starts"] == 1
    assert sum(content["seconds"].values()) == pytest.approx(content["seen"] - content["started"], abs=1e-3)
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if "loss" in row]
    for purpose in ("compute", "evaluation", "checkpoint", "compile", "start"):
        assert sum(row["seconds"][purpose] for row in rows) > 0, purpose
        assert content["seconds"][purpose] >= sum(row["seconds"][purpose] for row in rows) - 1e-6
    assert rows[0]["seconds"]["start"] > 0 == rows[1]["seconds"]["start"]
    assert all(sum(row["shares"].values()) == pytest.approx(1.0) for row in rows)


def test_a_profile_holds_the_steps_that_were_asked_for(config: RunConfig, tmp_path: Path) -> None:
    run = override(config, ["--optimiser.steps", "4", "--evaluate_every", "4"], "flags")
    train(run, tmp_path / "run", profile=(2, 3))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    steps = {
        value
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }
    assert steps == {2, 3}


@pytest.mark.parametrize("text", ["", "5", "0:2", "7:3", "a:b", "1:2:3"])
def test_steps_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match=r"--profile: cannot read .*write START:STOP"):
        parse_steps(text)
    assert parse_steps("21:25") == (21, 25)

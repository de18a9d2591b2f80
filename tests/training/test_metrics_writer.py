from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from scfm_jax.training.metrics import MetricsWriter, read_metrics


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 0.1 * step})
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


def test_a_resume_cuts_what_came_after_the_restored_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 0.5},
        {"step": 2, "held_out_loss": 0.7},
        {"step": 3},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsWriter(tmp_path, 2) as writer:
        assert read_metrics(path) == rows[:3]
        writer.write({"step": 3, "loss": 0.25})
    assert read_metrics(path) == [*rows[:3], {"step": 3, "loss": 0.25}]


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    with MetricsWriter(tmp_path, 1) as writer:
        writer.write({"step": 2, "loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'


def test_a_run_that_has_not_begun_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def events(folder: Path) -> Iterator[Event]:
    """Records of TFRecord files: a length, its checksum, an event, its checksum."""
    for path in sorted(folder.iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (size,) = struct.unpack_from("<Q", content, start)
            yield Event.FromString(content[start + 12 : start + 12 + size])
            start += 16 + size


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.5, "what": "text"}, {"step": 2, "held_out_loss": 0.25}]
    with MetricsWriter(tmp_path, 0) as writer:
        for row in rows:
            writer.write(row)
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [(1, "loss", 0.5), (2, "held_out_loss", 0.25)]

"""Events survive the way to disk and back, and readers forgive what they may."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from qlora_tui.engine import events as ev
from qlora_tui.engine.errors import JournalError
from qlora_tui.engine.events import EVENT_TYPES, Record, decode, encode

SAMPLES: list[ev.Event] = [
    ev.Started("20261125-1", {"lora_r": 16, "data": ("a", "b")}, {"torch": "2.13"}, {"name": "cpu"}, resumed_from=4),
    ev.Phase("fetch", "progress", done=3, total=9, unit="bytes", note="model"),
    ev.Prepared("messages", "why", 10, 8, 2, 100, 60, 2, 4, {"no answer": 1}, {"too long": 2}, 40, ("a note",)),
    ev.Planned({"total_bytes": 5, "items": [{"name": "weights", "bytes": 5}]}, {"optim": "adamw_torch"}),
    ev.Stepped(1, 30, 0.03, math.nan, math.inf, True, True, 2e-4, 900, 500, 1.5, 0.1, (3, 4), 1, 2, 3),
    ev.Evaluated(30, 2.8, 24, 0.1, "eval/x.jsonl", 4.5, 1.7, (1.2, 2.1), 0.9, "a measurable improvement"),
    ev.Evaluated(30, 2.8, 24, 0.3, "", 4.6, 1.7, (1.4, 2.0), 0.96, "v", ({"row": 3, "base_loss": 1.0, "loss": 2.0, "prompt": "a\x1b"},)),
    ev.Probed(30, "general", "passages", 23, 2900, 3.0, 3.1, -0.1, (-0.2, 0.01), 0.2),
    ev.Probed(30, "other_question", "answers", 24, 900, 5.0, 3.9, 1.3, (1.0, 1.6), 1.0, 0.03, (-0.09, 0.15)),
    ev.Sampled(30, "say 3", "abc \x1b]0;x\x07"),
    ev.Saved(10, "checkpoints/step-000010", 99),
    ev.MarkedHealthy(10),
    ev.Resumed(10),
    ev.RolledBack(10, 0.5, 1, "spike"),
    ev.Device(1, 2, 3, 0.5, None, None, 61.0, "power"),
    ev.Forecast((1.0, 2.0, 3.0), "measured steps"),
    ev.Finding("spike", "warn", 7, "loss rose", ("lower the rate",), {"loss": 9.0}),
    ev.Command("id", "set", True, "asked", 121, {"key": "learning_rate", "factor": 0.5}),
    ev.Finished("done", 0, "all steps done", "adapter", "report.md"),
]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return bool(ev.plain(left) == ev.plain(right))


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: event.type)
def test_every_event_comes_back_as_it_went(event: ev.Event) -> None:
    line = encode(Record(2, 7, 1.5, event))
    assert line.isascii()
    assert "\n" not in line
    back = decode(line)
    assert back is not None
    assert (back.attempt, back.seq, back.t, type(back.event)) == (2, 7, 1.5, type(event))
    for field in dataclasses.fields(event):
        assert _same(getattr(event, field.name), getattr(back.event, field.name)), field.name


def test_there_is_a_sample_of_every_type() -> None:
    assert {type(event) for event in SAMPLES} == set(EVENT_TYPES.values())


def test_numbers_that_are_not_finite_are_the_promised_strings() -> None:
    raw = json.loads(encode(Record(1, 1, 0.0, SAMPLES[4])))
    assert (raw["loss"], raw["grad_norm"]) == ("NaN", "Infinity")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        '{"v":1,"attempt":1',
        "[]",
        "7",
        '{"type":"started"}',
        '{"v":1,"type":"later","attempt":1,"seq":1,"t":0}',
        '{"v":1,"type":"resumed"}',
    ],
)
def test_torn_and_unknown_lines_are_skipped(line: str) -> None:
    assert decode(line) is None


def test_keys_of_a_later_version_are_ignored() -> None:
    record = decode('{"v":1,"attempt":1,"seq":1,"t":0,"type":"resumed","to_step":3,"mood":"good"}')
    assert record is not None
    assert record.event == ev.Resumed(3)


def test_a_later_format_is_refused_in_one_sentence() -> None:
    with pytest.raises(JournalError, match="newer qlora-tui"):
        decode('{"v":2,"attempt":1,"seq":1,"t":0,"type":"resumed","to_step":3}')

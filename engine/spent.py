"""What a run has cost, from its journal: the report's section on money."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine import models, money, prices
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.events import Device, Prepared, Started, Stepped
from qlora_tui.engine.forecast import Work
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder
from qlora_tui.engine.resume import readable
from qlora_tui.engine.spec import RunConfig, from_values

_LENGTHS = 2000


@dataclass(slots=True)
class _Read:
    """What the journal says that money depends on; `spans` are the first and last moment of each attempt."""

    started: Started | None = None
    prepared: Prepared | None = None
    steps: list[Stepped] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)


def section(folder: Path) -> list[str]:
    """Return the lines of the report on what the run in `folder` cost, in plain text; none where its journal does not tell.

    Hours are those of all attempts; watts are the mean of all looks at the device, pauses and measurements included.
    """
    read = _read(folder)
    if read.started is None or not read.spans:
        return []
    device = _machine(read.started.device)
    hours = sum(end - begin for begin, end in read.spans.values()) / 3600
    known, fault = prices.usable()
    rented = _rented(read, known)
    found = money.bill(known, device, (hours, hours), watts=statistics.fmean(read.watts) if read.watts else None, rented_hours=rented)
    return [*money.lines(found), *([f"Your own prices are left out: {fault}"] if fault else [])]


def _read(folder: Path) -> _Read:
    found = _Read()
    for record in read_records(folder / EVENTS):
        begin, _ = found.spans.get(record.attempt, (record.t, record.t))
        found.spans[record.attempt] = begin, record.t
        match record.event:
            case Started() as event:
                found.started = event
            case Prepared() as event:
                found.prepared = event
            case Stepped() as event:
                found.steps.append(event)
            case Device(power_watts=float() | int() as watts):
                found.watts.append(float(watts))
    return found


def _machine(device: Mapping[str, Any]) -> Machine:
    """Return the device that a journal names; only what decides its price and power."""
    kind, total = device.get("kind"), device.get("total_bytes")
    return Machine(str(device.get("name", "")), "cuda" if kind == "cuda" else "cpu", total if isinstance(total, int) else 0)


def _rented(read: _Read, known: prices.Prices) -> prices.Range | None:
    """Return the hours that the steps which were made would take on the card that would be rented; None where that is not known."""
    rows = sum(len(step.rows) for step in read.steps)
    if read.started is None or not rows:
        return None
    run = from_values(readable(read.started.config))
    spec = _spec(run)
    if spec is None:
        return None
    tokens, steps = sum(step.tokens for step in read.steps), len(read.steps)
    held = read.prepared.holdout_rows if read.prepared else 0
    lengths = sorted(_lengths(read.steps))
    return money.rented_hours(spec, run, known, Work(tokens, steps, steps, round(held * tokens / rows), lengths, rows, held))


def _lengths(steps: Sequence[Stepped]) -> list[int]:
    """Return the mean row of each of some steps: the journal knows no more, and a step's rows are alike."""
    each = [round(step.tokens / len(step.rows)) for step in steps if step.rows]
    return each[:: max(1, len(each) // _LENGTHS)]


def _spec(run: RunConfig) -> ModelSpec | None:
    name = run.model_name_or_path
    try:
        return models.from_folder(Path(name).expanduser()) if is_folder(name) else models.find(name)
    except EngineError:
        return None

"""What a run has cost, from what its journal says: the report's section on money."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tui.engine import models, money, prices
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.events import Started, Stepped
from qlora_tui.engine.forecast import Work
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.places import is_folder
from qlora_tui.engine.report.seen import Seen
from qlora_tui.engine.resume import readable
from qlora_tui.engine.spec import RunConfig, from_values

_LENGTHS = 2000


def lines(seen: Seen) -> list[str]:
    """Return what a run cost, in plain text; nothing where its journal does not tell.

    Hours are those of all attempts; watts are the mean of all looks at the device, pauses and measurements included.
    """
    if seen.started is None or not seen.spans:
        return []
    device = _machine(seen.started.device)
    hours = sum(end - begin for begin, end in seen.spans.values()) / 3600
    known, fault = prices.usable()
    rented = _rented(seen.started, seen, known)
    found = money.bill(known, device, (hours, hours), watts=statistics.fmean(seen.watts) if seen.watts else None, rented_hours=rented)
    return [*money.lines(found), *([f"Your own prices are left out: {fault}"] if fault else [])]


def _machine(device: Mapping[str, Any]) -> Machine:
    """Return the device that a journal names; only what decides its price and power."""
    kind, total = device.get("kind"), device.get("total_bytes")
    return Machine(str(device.get("name", "")), "cuda" if kind == "cuda" else "cpu", total if isinstance(total, int) else 0)


def _rented(started: Started, seen: Seen, known: prices.Prices) -> prices.Range | None:
    """Return the hours that the steps which were made would take on the card that would be rented; None where that is not known."""
    rows = sum(len(step.rows) for step in seen.made)
    if not rows:
        return None
    run = from_values(readable(started.config))
    spec = _spec(run)
    if spec is None:
        return None
    tokens, steps = sum(step.tokens for step in seen.made), len(seen.made)
    held = seen.prepared.holdout_rows if seen.prepared else 0
    lengths = sorted(_lengths(seen.made))
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

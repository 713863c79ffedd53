"""The device at work, and the figures of the last step that tell whether it works well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textual.content import Content

from qlora_tui.engine import units
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import Reading, RunState

_LABEL, _VALUE = 11, 13
_TABLE = 6
_PAST = 60
HOT = 87.0
WAITING = 0.3
"""The share of a step spent waiting for data from which on it is worth a colour."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One figure: its name, how it is written, its past and the range of that."""

    name: str
    value: str
    past: Sequence[tuple[float, float | None]] = ()
    low: float = 0.0
    high: float = 100.0
    style: str = ""
    note: str = ""
    whole_run: bool = False


class DevicePanel(Panel):
    """Utilization, power, temperature and their last ten minutes; learning rate, gradient norm, speed and waiting for data."""

    digit = "3"
    noun = "device"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the kind of device, and its name where that is known."""
        kind = "gpu" if state.machine.get("kind") == "cuda" else "cpu"
        name = one_line(state.machine.get("name", ""), limit=40)
        groups: list[list[Part]] = [[(self.digit, "bold $primary"), (f" {kind}", "")]]
        groups += [[(name, cells.DIM)]] if name else []
        groups += [[("past: 10 minutes", cells.DIM)]] if self.content_size.height >= _TABLE else []
        return cells.assemble(cells.fit(groups, self.heading_room))

    def key(self, state: RunState, view: View) -> Any:
        """Return what is shown: readings, the last step, and the past of a run that is read in."""
        return state.device, state.last, state.readings[-1:], state.history.stride, state.speed, still(view)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw a table with the past of each figure where there is room, else the figures in lines."""
        if height >= _TABLE:
            return cells.stack(_table(state, width)[:height])
        sensors = [group for row in _sensors(state) if (group := _brief(row))]
        if not sensors:
            sensors = [[("no reading yet" if state.device is None else "no sensors here", cells.DIM)]]
        lines = [_with_past(sensors, _of(state, lambda one: one.busy), state.t, width)]
        steps = [_brief(row) for row in _steps(state)]
        if height >= 3 and len(steps) > 2:
            lines.append(_two_pasts(state, width))
            lines.append(_with_past(steps[2:], _of(state, lambda one: one.speed), state.t, width))
        else:
            lines.append(cells.assemble(cells.fit(steps, width)))
        if state.device and state.device.throttle:
            told = cells.assemble([("▲ slowed down: ", cells.WARN), (one_line(state.device.throttle, limit=60), "")])
            lines.insert(1, told.truncate(width, ellipsis=True))
        return cells.stack(lines[: max(1, height)])


def _of(state: RunState, value: Callable[[Reading], float | None]) -> list[tuple[float, float | None]]:
    return [(reading.t, value(reading)) for reading in state.readings]


def _sensors(state: RunState) -> list[_Row]:
    """Return what the device's own sensors say; one that is missing has no row."""
    device, found = state.device, list[_Row]()
    if device is None:
        return found
    if device.utilization is not None:
        found.append(_Row("busy", f"{device.utilization:.0f} %", _of(state, lambda one: one.busy), style="bold"))
    if device.power_watts is not None:
        limit = f"/{device.power_limit_watts:.0f}" if device.power_limit_watts else ""
        past = _of(state, lambda one: one.watts)
        high = device.power_limit_watts or max([value for _, value in past if value is not None] + [1.0])
        found.append(_Row("power", f"{device.power_watts:.0f}{limit} W", past, 0.0, high))
    if device.temperature_c is not None:
        style = cells.WARN if device.temperature_c >= HOT else ""
        found.append(_Row("heat", f"{device.temperature_c:.0f} °C", _of(state, lambda one: one.celsius), 20.0, 100.0, style))
    return found


def _steps(state: RunState) -> list[_Row]:
    """Return the figures of the last steps."""
    last, found = state.last, list[_Row]()
    if last is None:
        return found
    buckets = state.history.buckets
    rates = [(float(bucket.last), bucket.rate) for bucket in buckets]
    norms = [(float(bucket.last), bucket.grad) for bucket in buckets]
    found.append(_Row("lr", words.rate(last.lr), rates, 0.0, max([rate for _, rate in rates] + [1e-12]), whole_run=True))
    style = cells.WARN if last.skipped else ""
    found.append(_Row("grad norm", words.number(last.grad_norm, 2), norms, 0.0, _most(norms), style, whole_run=True))
    if state.data_share is not None:
        style = cells.WARN if state.data_share > WAITING else ""
        found.append(_Row("data wait", units.percent(state.data_share), _of(state, lambda one: one.waiting), 0.0, 1.0, style))
    if state.speed is not None:
        past = _of(state, lambda one: one.speed)
        found.append(_Row("speed", f"{state.speed:,.0f} tok/s", past, 0.0, max([value for _, value in past if value] + [1.0])))
    found.append(_Row("step", f"{last.seconds:.2f} s"))
    return found


def _most(points: Sequence[tuple[float, float]]) -> float:
    """Return the top of a sparkline: the 98th percentile, so that one spike leaves the rest to be seen."""
    ranked = sorted(value for _, value in points if math.isfinite(value))
    return max(ranked[int(0.98 * (len(ranked) - 1))] * 1.1, 1e-9) if ranked else 1.0


def _brief(row: _Row) -> list[Part]:
    """Return a figure for a line of many: those whose unit names them go without their name."""
    if row.name in ("power", "heat", "speed"):
        return [(row.value, row.style)]
    if row.name == "busy":
        return [(row.value, row.style), (" busy", cells.DIM)]
    return [(f"{row.name} ", cells.DIM), (row.value, row.style)]


def _with_past(groups: list[list[Part]], past: Sequence[tuple[float, float | None]], now: float, width: int) -> Content:
    """Return figures on one line, and in the room that is left the last ten minutes of one of them."""
    parts = cells.fit(groups, width)
    room = min(_PAST, width - sum(Content(text).cell_length for text, _ in parts) - 2)
    known = [value for _, value in past if value is not None]
    if room >= 6 and known:
        high = 100.0 if max(known) <= 100.0 else max(known)
        parts = [*parts, ("  ", ""), (cells.timeline(past, room, now, low=0.0, high=high), cells.MAIN)]
    return cells.assemble(parts)


def _two_pasts(state: RunState, width: int) -> Content:
    """Return learning rate and gradient norm, each with its course over the whole run."""
    rate, norm = _steps(state)[:2]
    groups = [_brief(rate), _brief(norm)]
    used = sum(Content(text).cell_length for group in groups for text, _ in group)
    room = min(24, (width - used - 6) // 2)
    if room < 6:
        return cells.assemble(cells.fit(groups, width))
    parts: list[Part] = []
    for row, group in zip((rate, norm), groups, strict=True):
        parts += [*group, (" ", ""), (_past(row, room, state.t), cells.MAIN), ("   ", "")]
    return cells.assemble(parts[:-1])


def _past(row: _Row, room: int, now: float) -> str:
    if row.whole_run:
        return cells.spark([value for _, value in row.past if value is not None], room, low=row.low, high=row.high)
    return cells.timeline(row.past, room, now, low=row.low, high=row.high)


def _table(state: RunState, width: int) -> list[Content]:
    """Return one line a figure: name, value, and its past; the learning rate's and the gradient norm's is the whole run."""
    lines = []
    rows = [*_sensors(state), *_memory(state), *_steps(state)]
    room = max(0, min(_PAST, width - _LABEL - _VALUE - len("    whole run")))
    for row in rows:
        past = f"{_past(row, room, state.t):<{room}}" if row.past and room >= 6 else ""
        note = "  whole run" if row.whole_run and past else ""
        parts: list[Part] = [(f"{row.name:<{_LABEL}}", cells.DIM), (f"{row.value:>{_VALUE}}  ", row.style)]
        lines.append(cells.assemble([*parts, (past, cells.MAIN), (note, cells.DIM)]).truncate(width))
    if state.device and state.device.throttle:
        why = one_line(state.device.throttle, limit=100)
        lines.insert(0, cells.assemble([("▲ slowed down: ", cells.WARN), (why, "")]).truncate(width, ellipsis=True))
    return lines or [cells.assemble([("no reading yet", cells.DIM)])]


def _memory(state: RunState) -> list[_Row]:
    device = state.device
    if device is None or device.memory_ours_bytes is None:
        return []
    total = device.memory_total_bytes or state.machine_bytes or 0
    value = words.gib(device.memory_ours_bytes, unit=False) + (f"/{words.gib(total)}" if total else " GiB")
    return [_Row("memory", value, _of(state, lambda one: one.ours), 0.0, float(total or state.peak_bytes or 1))]

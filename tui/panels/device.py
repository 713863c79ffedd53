"""The device at work, and the figures of the last step that tell whether it works well."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.engine import units
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import RunState


class DevicePanel(Panel):
    """Utilization, power, temperature and their recent past; learning rate, gradient norm and waiting for data."""

    digit = "3"
    noun = "device"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the kind of device, and its name where that is known."""
        kind = "gpu" if state.machine.get("kind") == "cuda" else "cpu"
        name = one_line(state.machine.get("name", ""), limit=40)
        return Content.assemble((self.digit, "bold $primary"), f" {kind}", (f"  {name}" if name else "", cells.DIM))

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the sensors with a sparkline, and the step's figures beneath."""
        sensors = cells.fit(_sensors(state), width)
        used = sum(Content(text).cell_length for text, _ in sensors)
        room = width - used - 2
        if room >= 6 and state.usage:
            sensors = [*sensors, ("  ", ""), (cells.spark(state.usage, room), cells.MAIN)]
        lines = [
            cells.assemble(sensors or [("no reading yet" if state.device is None else "no sensors here", cells.DIM)]),
            cells.assemble(cells.fit(_step(state), width)),
        ]
        if state.device and state.device.throttle:
            lines.insert(1, cells.assemble([("▲ slowed down: ", cells.WARN), (one_line(state.device.throttle, limit=60), "")]))
        return cells.stack(lines[: max(1, height)])


def _sensors(state: RunState) -> list[list[Part]]:
    device, found = state.device, list[list[Part]]()
    if device is None:
        return found
    if device.utilization is not None:
        found.append([(f"{device.utilization:.0f} %", "bold"), (" busy", cells.DIM)])
    if device.power_watts is not None:
        limit = f"/{device.power_limit_watts:.0f}" if device.power_limit_watts else ""
        found.append([(f"{device.power_watts:.0f}{limit} W", "")])
    if device.temperature_c is not None:
        hot = device.temperature_c >= 87
        found.append([(f"{device.temperature_c:.0f} °C", cells.WARN if hot else "")])
    return found


def _step(state: RunState) -> list[list[Part]]:
    last, found = state.last, list[list[Part]]()
    if last is None:
        return found
    found.append([("lr ", cells.DIM), (words.rate(last.lr), "")])
    found.append([("grad norm ", cells.DIM), (words.number(last.grad_norm, 2), cells.WARN if last.skipped else "")])
    if state.data_share is not None:
        found.append([("data wait ", cells.DIM), (units.percent(state.data_share), cells.WARN if state.data_share > 0.3 else "")])
    found.append([("step ", cells.DIM), (f"{last.seconds:.2f} s", "")])
    return found

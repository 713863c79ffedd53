"""The two lines on top: what runs and in which state, then the figures that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textual.content import Content

from qlora_tui.engine.spec import BUILTIN
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View, still
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import RunState, phase_words

_OUTCOMES = {
    "done": ("✔ done", cells.GOOD),
    "stopped": ("■ stopped, saved", cells.WARN),
    "aborted": ("■ aborted", cells.WARN),
    "failed": ("✖ failed", cells.BAD),
    "will_not_fit": ("✖ does not fit", cells.BAD),
    "diverged": ("✖ diverged", cells.BAD),
}


_SILENT_SECONDS = 15.0
"""A run says something every second, how the device is; this much silence means that its process does not get to it."""


def state_words(state: RunState, view: View) -> Part:
    """Return the state of the run as a glyph and a word; colour only repeats what they say."""
    if state.finished:
        return _OUTCOMES.get(state.finished.outcome, (f"■ {state.finished.outcome}", cells.WARN))
    if view.lost:
        silent = view.now - state.t
        return (f"✖ crashed{f', silent for {words.duration(silent // 60 * 60)}' if state.t and silent >= 60 else ''}", cells.BAD)
    if view.stopping:
        return ("◌ stopping, then saves", cells.WARN)
    if state.paused_at:
        return _resting(state, view)
    if (silent := view.now - state.t) > _SILENT_SECONDS and state.t:
        return (f"◌ no word for {words.since(silent)}", cells.WARN)
    if state.asked_to_pause:
        return ("◌ pausing", cells.WARN)
    if state.doing and state.doing.name != "train":
        return (f"◌ {phase_words(state.doing.name, state.doing.note)}", cells.MAIN)
    if state.last or state.doing:
        return ("● training", cells.GOOD)
    return ("◌ starting", cells.MAIN)


def _resting(state: RunState, view: View) -> Part:
    """Return how long the run has paused, and what would end that."""
    since = words.since(view.now - state.paused_at)
    if not state.asked_to_pause:
        return (f"◌ paused {since}, goes on by itself", cells.WARN)
    return (f"◌ paused {since}{'' if view.readonly else ' · p goes on'}", cells.WARN)


def figures(state: RunState, view: View, *, short: int = 0) -> list[list[Part]]:
    """Return the figures of the second line in the order they are read; `short`, up to 2, leaves out what they can do without."""
    found: list[list[Part]] = []
    if state.total_steps or state.step:
        total = f"/{state.total_steps:,}" if state.total_steps else ""
        found.append([*([("step ", cells.DIM)] if short < 2 else []), (f"{state.step:,}{total}", "bold")])
    if state.last:
        found.append([("ep " if short else "epoch ", cells.DIM), (f"{state.last.epoch:.{1 if short else 2}f}", "")])
        smooth = state.history.smooth
        loss = state.last.loss if smooth is None else smooth
        found.append([("loss ", cells.DIM), (words.number(loss), "bold")])
    if state.speed is not None:
        found.append([(f"{state.speed:,.0f}", "bold"), (" tok/s", cells.DIM)])
    if state.finished:
        found.append([("took ", cells.DIM), (words.duration(state.t - state.started_at), "bold")])
    elif state.forecast and state.step < state.total_steps and not (view.stopping or view.lost or state.paused_at):
        found.append(_time_left(state, view))
    if state.started_at and not state.last and not state.finished:
        found.append([("begun ", cells.DIM), (words.duration(max(1, int(view.now - state.started_at))), ""), (" ago", cells.DIM)])
    return found


def _time_left(state: RunState, view: View) -> list[Part]:
    if state.forecast is None:
        return []
    passed = max(0.0, view.now - state.forecast_at)
    low, mid, high = (max(0.0, part - passed) for part in state.forecast.seconds_left)
    middle, around = words.left((low, mid, high))
    return [("left ", cells.DIM), (middle, "bold"), (f" ({around}) · {words.clock(view.now + mid)}", cells.DIM)]


def kept(state: RunState, view: View) -> list[Part]:
    """Return how old the last checkpoint is, and which was the last that proved healthy; nothing before the first."""
    if state.saved is None:
        return []
    minutes = int(max(0.0, view.now - state.saved_at) // 60)
    age = "just now" if not minutes else f"{minutes} min ago" if minutes < 120 else f"{words.duration(minutes * 60)} ago"
    found: list[Part] = [("saved ", cells.DIM), (f"step {state.saved.step:,}", ""), (f", {age}" if not state.finished else "", cells.DIM)]
    if state.healthy is not None:
        found.append((f", healthy {state.healthy:,}", cells.DIM))
    return found


def title(state: RunState) -> list[list[Part]]:
    """Return what is trained, in a few groups: run, model, method, shape."""
    config = state.config
    model = one_line(config.get("model_name_or_path", ""), limit=60).rsplit("/", 1)[-1].removeprefix(BUILTIN)
    groups: list[list[Part]] = [[(one_line(state.run_id, limit=60) or "qlora-tui", "bold")]]
    if model:
        groups.append([("· ", cells.DIM), (model, cells.MAIN)])
    method = config.get("bnb_4bit_quant_type") if config.get("method") == "qlora" else config.get("method")
    if method:
        groups.append([("· ", cells.DIM), (one_line(f"{method} r{config.get('lora_r', '?')}"), "")])
    if config.get("max_length"):
        micro, sums = config.get("per_device_train_batch_size", "?"), config.get("gradient_accumulation_steps", "?")
        groups.append([("· ", cells.DIM), (one_line(f"{micro} x {sums} x {config['max_length']}"), "")])
    return groups


NARROW = 72
"""Below so many cells the figures need two lines, whatever they are: a height that depends on them would jump."""


class StatusLine(Panel):
    """What runs and how it stands; two lines, or three where it is narrow, that never leave the screen."""

    noun = "status"

    def show(self, state: RunState, view: View) -> None:
        """Draw, in as many lines as the width asks for."""
        height = 3 if self.app.size.width < NARROW else 2
        if self.styles.height is None or self.styles.height.value != height:
            self.styles.height = height
        super().show(state, view)

    def heading(self, state: RunState, view: View) -> Content:
        """Return nothing: these lines have no frame."""
        return Content("")

    def key(self, state: RunState, view: View) -> Any:
        """Return what is shown: the clock counts in whole seconds, and only while the run goes on."""
        return state.seq, still(view), None if state.finished or view.lost else int(view.now)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw the title with the state at its right, and the figures beneath, in short words where long ones have no room."""
        right: Sequence[Part] = [state_words(state, view)]
        used = Content(right[0][0]).cell_length
        first = cells.row(cells.fit(title(state), max(0, width - used - 1), " "), right, width)
        short = next((short for short in (0, 1) if height > 2 or cells.fits(figures(state, view, short=short), width)), 2)
        told = [*figures(state, view, short=short), *([kept(state, view)] if state.saved else [])]
        return cells.stack([first, *cells.flow(told, width, height - 1)])

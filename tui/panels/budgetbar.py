"""The memory bar at the foot of the wizard: what would be needed of what there is, by part, and how long it takes."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.engine.budget import Budget
from qlora_tui.engine.fixes import Fix
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.desk import Outlook

_LABEL, _ALL = 9, 5
_GROUPS = (
    ("weights", ("weights", "embeddings"), "█", "$primary"),
    ("adapter", ("adapter", "gradients"), "▓", "$success"),
    ("optimizer", ("optimizer",), "█", "$warning"),
    ("activations", ("activations", "workspace", "kernels"), "▓", "$part-activations"),
    ("loss", ("loss",), "█", "$part-loss"),
)
_SMALL = int(0.05 * (1 << 30))
_REST = ("rest", "▒", "$part-rest")


def badge(budget: Budget) -> Part:
    """Return whether it fits, as a glyph and a word."""
    if not budget.fits:
        return ("✖ too big", f"bold {cells.BAD}")
    return ("▲ tight", f"bold {cells.WARN}") if budget.tight else ("● fits", f"bold {cells.GOOD}")


def draw_outlook(
    outlook: Outlook | None,
    advice: Fix | None,
    width: int,
    *,
    now: float,
    waiting: str = "",
    no_time: str = "",
    key: str = "f",
    room: int = 5,
) -> Content:
    """Return the five lines of the bar, or the most telling of them where there is less room; an estimate says that it is one.

    Args:
        outlook: what the run would need, or None while the model is not known.
        advice: the change to offer.
        width: cells to draw in.
        now: the clock.
        waiting: why there is no outlook.
        no_time: why there is no time yet.
        key: the key that takes the advice here, if there is one.
        room: lines to draw in.
    """
    if outlook is None:
        hint = waiting or "pick a model to see what it needs"
        return cells.stack([cells.assemble([_label("memory"), (hint, cells.DIM)]), *[Content(" ")] * 4])
    budget = outlook.budget
    used = budget.total_bytes + budget.machine.others_bytes
    total = max(budget.machine.total_bytes, 1)
    margin = words.gib(budget.margin_bytes, unit=False)
    figure = f"  {words.gib(budget.total_bytes, unit=False)} of {words.gib(budget.machine.total_bytes)} (± {margin})"
    mark = badge(budget)
    length = max(10, width - _LABEL - len(figure) - len(mark[0]) - 3)
    parts = [_label("memory"), *cells.bar(_pieces(budget), max(total, used), length), (figure, "bold")]
    bar = cells.row(parts, [mark], width)
    legend = cells.assemble([_label(""), *cells.fit(_legend(budget), width - _LABEL)])
    time = cells.assemble([_label("time"), *_time(outlook, width - _LABEL, now, no_time)])
    told = _advice(outlook, advice, width, f"{key} " if key else "")
    if room < _ALL:
        return cells.stack([bar, time, legend if budget.fits and not budget.tight else told][:room])
    why = cells.assemble([_label("plan"), (one_line(outlook.plan.why, limit=200), "")]).truncate(width, ellipsis=True)
    return cells.stack([bar, legend, why, time, told])


def in_few_words(page: str, number: int, run: RunConfig, outlook: Outlook | None, width: int) -> Content:
    """Return the wizard as text, most important first, for a terminal too small for its pages: the keys still work."""
    name = one_line(run.model_name_or_path, limit=60).rsplit("/", 1)[-1]
    lines = [cells.assemble([(f"{number}/5 {page}", f"bold {cells.MAIN}")]), cells.assemble([(name or "no model yet", "")])]
    if outlook is not None:
        total = words.gib(outlook.budget.machine.total_bytes)
        need = f"{words.gib(outlook.budget.total_bytes, unit=False)}/{total} "
        lines.append(cells.assemble([("memory ", cells.DIM), (need, "bold"), badge(outlook.budget)]))
        if outlook.time is not None:
            took = words.duration(outlook.time.total_seconds[1])
            lines.append(cells.assemble([("time ", cells.DIM), (took, "bold"), (" estimated", cells.DIM)]))
    lines.append(cells.assemble([("enter on, esc back; pages need 40x12", cells.DIM)]))
    return cells.stack([line.truncate(width, ellipsis=True) for line in lines])


def _label(text: str) -> Part:
    return (f" {text:<{_LABEL - 1}}", cells.DIM)


def _pieces(budget: Budget) -> list[tuple[float, str, str]]:
    pieces = [(float(budget.bytes_of(*names)), glyph, style) for _, names, glyph, style in _GROUPS]
    rest = budget.total_bytes - sum(amount for amount, _, _ in pieces)
    return [*pieces, (rest, _REST[1], _REST[2]), (float(budget.machine.others_bytes), "▒", cells.DIM)]


def parts_of(budget: Budget) -> list[tuple[str, float]]:
    """Return the parts of the bar that are worth a figure, by label, the rest last; they add up to the whole."""
    found = [(label, float(budget.bytes_of(*names))) for label, names, _, _ in _GROUPS]
    shown = [(label, amount) for label, amount in found if amount >= _SMALL]  # what would read 0.0 is part of the rest
    return [*shown, (_REST[0], budget.total_bytes - sum(amount for _, amount in shown))]


def _legend(budget: Budget) -> list[list[Part]]:
    styles = {label: style for label, _, _, style in _GROUPS} | {_REST[0]: _REST[2]}
    shown: list[list[Part]] = [[(label, styles[label]), (f" {_short(amount)}", "")] for label, amount in parts_of(budget)]
    if budget.machine.others_bytes:
        shown.append([("others", cells.DIM), (f" {_short(budget.machine.others_bytes)}", cells.DIM)])
    return shown


def _short(amount: float) -> str:
    return words.gib(amount, unit=False)


def _time(outlook: Outlook, width: int, now: float, no_time: str) -> list[Part]:
    if outlook.time is None and outlook.typical is not None:
        low, mid, high = outlook.typical.total_seconds
        told: list[list[Part]] = [[(words.duration(mid), "bold"), (f" ({words.span(low, high)})", cells.DIM)]]
        told += [[(f"for {outlook.assumed}", "")], [("· an estimate; yours once data are named", cells.DIM)]]
        return cells.fit(told, width, " ")
    if outlook.time is None:
        return [("no estimate for this device" if outlook.steps else no_time, cells.DIM)]
    low, mid, high = outlook.time.total_seconds
    groups: list[list[Part]] = [[(f"{words.duration(mid)}", "bold"), (f" ({words.span(low, high)})", cells.DIM)]]
    groups.append([(f"· {outlook.steps:,} steps of {words.duration(outlook.time.step_seconds[1])}", cells.DIM)])
    groups.append([(f"· done about {words.clock(now + mid)}", cells.DIM)])
    groups.append([("· an estimate", cells.DIM)])
    return cells.fit(groups, width, " ")


def _advice(outlook: Outlook, advice: Fix | None, width: int, key: str) -> Content:
    if advice is None:
        return Content(" ") if outlook.budget.fits else cells.assemble([_label("fix"), ("choose a smaller model", cells.WARN)])
    text = one_line(advice.text, limit=200)
    if outlook.budget.fits and not outlook.budget.tight:
        parts = [_label("tip"), (key, f"bold {cells.MAIN}"), (text, cells.DIM)]
    else:
        parts = [_label("fix"), (key, f"bold {cells.MAIN}"), (text, cells.WARN)]
    return cells.assemble(parts).truncate(width, ellipsis=True)

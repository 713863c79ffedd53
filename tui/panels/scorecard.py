"""How a run ended: did it help, by how much, where the adapter lies, and what to do next."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.engine.text import one_line
from qlora_tui.tui import words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import RunState

_LABEL = 10


class ScorecardPanel(Panel):
    """The end of a run in five lines."""

    noun = "result"

    def heading(self, state: RunState, view: View) -> Content:
        """Return the word for this panel."""
        return Content.styled("result", "bold")

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw what came out; the verdict first, since it is what people came for."""
        lines = [cells.assemble(parts).truncate(width, ellipsis=True) for parts in result_lines(state, view)]
        return cells.stack(lines[:height])


def result_lines(state: RunState, view: View) -> list[list[Part]]:
    """Return the lines of the result, also used where there is no room for a frame."""
    lines: list[list[Part]] = []
    score, end = state.scorecard, state.finished
    if score and score.base_loss is not None:
        lines.append(_labelled("held-out", [*_drop(score.base_loss, score.loss), *_interval(state)]))
        if score.verdict:
            lines.append(_labelled("verdict", [(one_line(score.verdict, limit=200), f"bold {_verdict_colour(state)}")]))
    elif state.evals:
        lines.append(_labelled("held-out", [(f"loss {words.number(state.evals[-1][1])} at step {state.evals[-1][0]}", "")]))
    if end:
        colour = cells.GOOD if end.outcome == "done" else cells.WARN if end.outcome in ("stopped", "aborted") else cells.BAD
        lines.append(_labelled("ended", [(one_line(end.reason, limit=300) or end.outcome, colour)]))
    elif view.lost:
        lines.append(_labelled("ended", [("the program that ran this ended without a word", cells.BAD)]))
    if state.adapter:
        path = state.adapter if "/" in state.adapter or not view.folder else f"{view.folder}/{state.adapter}"
        lines.append(_labelled("adapter", [(one_line(path, limit=300), "bold")]))
    lines.append(_labelled("next", [(next_command(state, view), cells.MAIN), ("   q leaves", cells.DIM)]))
    return lines


def next_command(state: RunState, view: View) -> str:
    """Return the one command a person most likely wants now."""
    run = one_line(state.run_id, limit=80) or "last"
    goes_on = view.lost or (state.finished is not None and state.finished.outcome in ("stopped", "aborted", "failed", "diverged"))
    if goes_on and state.marks:
        return f"qlora-tui --resume {run}"
    return f"qlora-tui attach {run}"


def _labelled(label: str, parts: list[Part]) -> list[Part]:
    return [(f"{label:<{_LABEL}}", cells.DIM), *parts]


def _drop(base: float, tuned: float) -> list[Part]:
    return [("base ", cells.DIM), (words.number(base, 2), ""), (" → tuned ", cells.DIM), (words.number(tuned, 2), "bold")]


def _interval(state: RunState) -> list[Part]:
    score = state.scorecard
    if score is None or score.drop is None:
        return []
    parts: list[Part] = [("   drop ", cells.DIM), (words.number(score.drop, 2), f"bold {_verdict_colour(state)}")]
    if score.interval:
        parts.append((f" ({words.number(score.interval[0], 2)} to {words.number(score.interval[1], 2)})", cells.DIM))
    if score.better_share is not None:
        parts.append((f"   better on {score.better_share:.0%} of {score.rows} rows", cells.DIM))
    return parts


def _verdict_colour(state: RunState) -> str:
    score = state.scorecard
    if score is None or score.drop is None:
        return ""
    sure = score.interval is None or score.interval[0] > 0
    return cells.GOOD if score.drop > 0 and sure else cells.WARN if score.drop > 0 else cells.BAD

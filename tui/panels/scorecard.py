"""How a run ended: did it help, by how much, where the adapter lies, and what to do next."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.engine.events import Evaluated, Probed
from qlora_tui.engine.text import one_line
from qlora_tui.tui import scoretext, words
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.state import RunState

_LABEL = 10


class ScorecardPanel(Panel):
    """The end of a run in a few lines; the frame is as high as they need."""

    noun = "result"

    def show(self, state: RunState, view: View) -> None:
        """Draw, in a frame without empty lines."""
        height = len(result_lines(state, view)) + 2
        if self.styles.height is None or self.styles.height.value != height:
            self.styles.height = height
        super().show(state, view)

    def heading(self, state: RunState, view: View) -> Content:
        """Return the word for this panel."""
        return Content.styled("result", "bold")

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw what came out; the verdict first, since it is what people came for."""
        lines = [cells.assemble(parts).truncate(width, ellipsis=True) for parts in result_lines(state, view, width)]
        return cells.stack(lines[:height])


def result_lines(state: RunState, view: View, width: int = 120) -> list[list[Part]]:
    """Return the lines of the result, whole phrases of them only: their number does not depend on `width`."""
    lines: list[list[Part]] = []
    score, end = state.scorecard, state.finished
    room = width - _LABEL
    if score and score.base_loss is not None:
        lines.append(_labelled("held-out", cells.fit(_losses(state, score), room, "   ")))
        if score.verdict:
            lines.append(_labelled("verdict", cells.fit(_verdict(state, score), room, "")))
        lines += _worse(score, room)
    elif state.evals:
        lines.append(_labelled("held-out", [(f"loss {words.number(state.evals[-1][1])} at step {state.evals[-1][0]}", "")]))
    if state.probes:
        lines.append(_labelled("checked", cells.fit(_checked(state), room, "   ")))
    if end:
        colour = cells.GOOD if end.outcome == "done" else cells.WARN if end.outcome in ("stopped", "aborted") else cells.BAD
        lines.append(_labelled("ended", [(one_line(end.reason, limit=300) or end.outcome, colour)]))
    elif view.lost:
        lines.append(_labelled("ended", [("the program that ran this ended without a word", cells.BAD)]))
    if state.adapter:
        path = state.adapter if "/" in state.adapter or not view.folder else f"{view.folder}/{state.adapter}"
        lines.append(_labelled("adapter", [(one_line(path, limit=300), "bold")]))
    lines.append(_labelled("next", cells.fit([*_next(state, view), [("q leaves", cells.DIM)]], room, "   ")))
    return lines


def _next(state: RunState, view: View) -> list[list[Part]]:
    """Return what a person most likely wants now: to go on, or to read how the adapter is used."""
    goes_on = view.lost or (state.finished is not None and state.finished.outcome in ("stopped", "aborted", "failed", "diverged"))
    if goes_on and state.marks:
        ill = state.finished is not None and state.finished.outcome == "diverged"
        then = " goes back, with half the learning rate" if ill else " goes on"
        return [[(f"qlora-tui --resume {one_line(state.run_id, limit=80) or 'last'}", cells.MAIN), (then, cells.DIM)]]
    if state.finished and state.adapter:
        return [[("report.md", cells.MAIN), (" and ", cells.DIM), ("report.html", cells.MAIN), (" beside it say how to use it", cells.DIM)]]
    return [[("log.txt", cells.MAIN), (" in the run's folder says more", cells.DIM)]]


def _labelled(label: str, parts: list[Part]) -> list[Part]:
    return [(f"{label:<{_LABEL}}", cells.DIM), *parts]


def _losses(state: RunState, score: Evaluated) -> list[list[Part]]:
    """Return base and tuned loss; a run stopped between two measurements says of which step its figure is."""
    base, tuned = words.number(score.base_loss or 0.0, 2), words.number(score.loss, 2)
    found: list[list[Part]] = [[("base ", cells.DIM), (base, ""), (" → tuned ", cells.DIM), (tuned, "bold")]]
    if score.step != state.step:
        found.append([(f"measured at step {score.step:,} of {state.step:,}", cells.WARN)])
    if score.better_share is not None:
        found.append([(f"{round(score.better_share * score.rows):,} of {score.rows:,} rows got better", "")])
    return found


def _verdict(state: RunState, score: Evaluated) -> list[list[Part]]:
    """Return the verdict and the drop it rests on: that of the mean row, which is not the difference of the losses above."""
    colour = f"bold {_verdict_colour(state)}"
    found: list[list[Part]] = [[(one_line(score.verdict.split(":", 1)[0], limit=80), colour)]]
    if score.drop is not None:
        told = f", mean row {words.number(abs(score.drop), 2)} nats {'lower' if score.drop >= 0 else 'higher'}"
        found.append([(told, "")])
        if score.interval:
            found.append([(f" ({words.number(score.interval[0], 2)} to {words.number(score.interval[1], 2)})", cells.DIM)])
    return found


def _worse(score: Evaluated, room: int) -> list[list[Part]]:
    """Return one line with the row that lost most; all of them are in the report."""
    told = [row for row in score.worst if isinstance(row.get("base_loss"), (int, float)) and isinstance(row.get("loss"), (int, float))]
    if not told:
        return []
    first = told[0]
    parts: list[list[Part]] = [[(f"row {one_line(first.get('row', ''), limit=12)} ", ""), _arrow(first["base_loss"], first["loss"])]]
    parts += [[(f"and {len(told) - 1} more in report.md", cells.DIM)]] if len(told) > 1 else []
    parts.append([(scoretext.about(first), cells.DIM)])
    return [_labelled("worse", cells.fit(parts, room, "   "))]


def _checked(state: RunState) -> list[list[Part]]:
    """Return what the last checks measured; where one of them found something, it is a warning of its own as well."""
    spoken = {"general": "forgetting", "train": "overfitted", "other_question": "manner"}
    said = {"manner": "manner alone?"}
    warned = {finding.detector for finding in state.warnings}
    return [
        [*_probed(name, probed), *([(f" {said.get(spoken[name], spoken[name])}", cells.WARN)] if spoken.get(name) in warned else [])]
        for name, probed in state.probes.items()
    ]


def _probed(name: str, probed: Probed) -> list[Part]:
    """Return what one check measured; what answers gained after any question is how they are said, the rest what they say."""
    if probed.own_more is not None:
        return [("learned ", cells.DIM), (f"manner {probed.drop:+.2f}, content {probed.own_more:+.2f} nats", "")]
    return [(f"{scoretext.PROBES.get(name, one_line(name, limit=20))} ", cells.DIM), _arrow(probed.base_loss, probed.loss)]


def _arrow(before: float, after: float) -> Part:
    return f"{words.number(before, 2)} → {words.number(after, 2)}", ""


def _verdict_colour(state: RunState) -> str:
    score = state.scorecard
    if score is None or score.drop is None:
        return ""
    sure = (score.interval is None or score.interval[0] > 0) and not score.manner
    return cells.GOOD if score.drop > 0 and sure else cells.WARN if score.drop > 0 else cells.BAD

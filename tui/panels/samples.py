"""What the model wrote when it was asked: prompt and text, the newest first."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.engine.events import Sampled
from qlora_tui.engine.text import one_line, safe_text
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.base import Panel, View
from qlora_tui.tui.state import RunState


class SamplesPanel(Panel):
    """The newest sample in short; filling the screen, any of them in full."""

    digit = "6"
    noun = "samples"

    def heading(self, state: RunState, view: View) -> Content:
        """Return which of how many is shown, and of which step."""
        groups = [[(self.digit, "bold $primary"), (" samples", "")]]
        if state.samples:
            at = _picked(state, view)
            groups.append([(f"step {state.samples[at].step:,}", "bold")])
            groups.append([(f"{at + 1} of {len(state.samples)}", cells.DIM)])
        return cells.assemble(cells.fit(groups, self.heading_room))

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Draw one sample; its prompt is cut to a line where there is little room."""
        if not state.samples:
            return cells.assemble([("no sample so far", cells.DIM)])
        sample = state.samples[_picked(state, view)]
        if view.zoomed != "samples":
            lines = [_prompt(sample, width), *_wrapped(sample.text, width)]
            return cells.stack(_held(lines, height, width))
        lines = [*_wrapped(sample.prompt, width, cells.DIM), Content(" "), *_wrapped(sample.text, width)]
        return cells.stack(_held(lines[min(view.scroll, max(0, len(lines) - 1)) :], height, width))


def _picked(state: RunState, view: View) -> int:
    back = view.picked if view.zoomed == "samples" else 0
    return max(0, len(state.samples) - 1 - back)


def _prompt(sample: Sampled, width: int) -> Content:
    return cells.assemble([(one_line(sample.prompt, limit=300), cells.DIM)]).truncate(width, ellipsis=True)


def _wrapped(text: str, width: int, style: str = "") -> list[Content]:
    """Return foreign text in lines of `width`, its own line breaks kept; a stroke before each tells them from lines of ours."""
    found: list[Content] = []
    for line in safe_text(text).split("\n"):
        whole = Content.styled(line, style) if style else Content(line)
        found += whole.wrap(max(1, width - 2)) if line.strip() else [Content("")]
    return [Content.assemble(("│ ", cells.DIM), line) for line in found]


def _held(lines: list[Content], height: int, width: int) -> list[Content]:
    """Return the lines that have room; where some have not, the last one says so."""
    if len(lines) <= height:
        return lines
    return [*lines[: height - 1], cells.assemble([(lines[height - 1].plain, ""), (" …", cells.DIM)]).truncate(width, ellipsis=True)]

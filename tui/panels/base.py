"""The form of a panel: a frame with a number, and a pure drawing that is sent only when it changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from textual.content import Content
from textual.widgets import Static

from qlora_tui.tui.panels import cells
from qlora_tui.tui.state import RunState


@dataclass(frozen=True, slots=True)
class View:
    """What the person chose to see, beside the state itself; `now` is the clock, so that drawing stays pure."""

    now: float = 0.0
    ascii_only: bool = False
    log_y: bool = False
    zoomed: str = ""
    needle: str = ""
    scroll: int = 0
    lost: bool = False
    stopping: bool = False
    readonly: bool = False
    folder: str = ""


def still(view: View) -> View:
    """Return `view` without its clock."""
    return replace(view, now=0.0)


class Panel(Static):
    """One framed part of the run screen; a subclass gives `digit`, `noun` and `draw`."""

    digit: ClassVar[str] = ""
    noun: ClassVar[str] = ""

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        """Start empty; `show` brings the first drawing."""
        super().__init__("", id=id, classes=classes, markup=False)
        self._shown: Content | None = None
        self._heading: Content | None = None
        self._key: Any = None
        self._state = RunState()
        self._view = View()

    def show(self, state: RunState, view: View) -> None:
        """Draw `state` if this panel can be seen, what it shows has changed, and the cells differ from those on screen."""
        self._state, self._view = state, view
        self._redraw()

    def on_resize(self) -> None:
        """Draw again for the new size."""
        self._redraw()

    def key(self, state: RunState, view: View) -> Any:
        """Return what the drawing depends on, compared with `==`: an equal key means that nothing has to be drawn.

        A panel that shows the clock adds it; one that is slow to draw names only what it shows.
        """
        return state.seq, still(view)

    def draw(self, state: RunState, view: View, width: int, height: int) -> Content:
        """Return the cells; pure: the same arguments give the same cells."""
        raise NotImplementedError

    def heading(self, state: RunState, view: View) -> Content:
        """Return the words in the frame."""
        return Content.assemble((self.digit, "bold $primary"), f" {self.noun}" if self.digit else self.noun)

    def words(self) -> str:
        """Return what is shown as text: heading and lines, without the spaces that end them."""
        heading = self._heading.plain.strip() if self._heading else ""
        lines = [line.rstrip() for line in self._shown.plain.split("\n")] if self._shown else []
        return "\n".join([*([heading] if heading else []), *lines]).strip("\n")

    def _redraw(self) -> None:
        size = self.content_size
        if not self.display or size.width <= 0 or size.height <= 0:
            return
        key = (size, self.key(self._state, self._view))
        if key == self._key:
            return
        self._key = key
        heading, drawn = self.heading(self._state, self._view), self.draw(self._state, self._view, size.width, size.height)
        heading = heading.truncate(max(1, self.outer_size.width - 6), ellipsis=True)
        heading, drawn = cells.themed(heading), cells.themed(drawn)
        if self._view.ascii_only:
            heading, drawn = cells.plain_ascii(heading), cells.plain_ascii(drawn)
        if self._heading is None or not self._heading.is_same(heading):
            self._heading = heading
            self.border_title = heading
        if self._shown is None or not self._shown.is_same(drawn):
            self._shown = drawn
            self.update(drawn, layout=False)

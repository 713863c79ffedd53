"""The form of a panel: a frame with a number, and a pure drawing of which only the cells that changed are sent."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from textual.content import Content
from textual.geometry import Region
from textual.widgets import Static

from qlora_tui.tui.history import Bucket
from qlora_tui.tui.panels import cells
from qlora_tui.tui.sight import Sight
from qlora_tui.tui.state import RunState


@dataclass(frozen=True, slots=True)
class View:
    """What the person chose to see, beside the state itself; `now` is the clock, so that drawing stays pure.

    `close` are the buckets of the part that is looked at, read again from the file; `share` is how much of the file was read;
    `picked` counts samples, or matches of the search, back from the newest.
    """

    now: float = 0.0
    ascii_only: bool = False
    log_y: bool = False
    zoomed: str = ""
    needle: str = ""
    scroll: int = 0
    picked: int = 0
    lost: bool = False
    stopping: bool = False
    readonly: bool = False
    folder: str = ""
    sight: Sight = field(default_factory=Sight)
    close: tuple[Bucket, ...] | None = None
    share: float = 1.0


def still(view: View) -> View:
    """Return `view` without its clock."""
    return replace(view, now=0.0)


_NOTHING = Content("")


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

    @property
    def visual(self) -> Content:
        """Return what is on screen; the base class would repaint every cell for a new one."""
        return self._shown if self._shown is not None else _NOTHING

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

    @property
    def heading_room(self) -> int:
        """Return how many cells the words in the frame may take: as many as they like where there is no frame yet."""
        width = self.outer_size.width
        return max(1, width - 6) if width else 100_000

    def words(self) -> str:
        """Return what is shown as text: heading and lines, without the spaces that end them."""
        heading = self._heading.plain.strip() if self._heading else ""
        lines = [line.rstrip() for line in self._shown.plain.split("\n")] if self._shown else []
        return "\n".join([*([heading] if heading else []), *lines]).strip("\n")

    def _redraw(self) -> None:
        size = self.content_size
        if size.width <= 0 or size.height <= 0 or not all(node.display for node in self.ancestors_with_self):
            return
        key = (size, self.key(self._state, self._view))
        if key == self._key:
            return
        self._key = key
        drawn = self.draw(self._state, self._view, size.width, size.height)
        heading = self.heading(self._state, self._view).truncate(self.heading_room, ellipsis=True)
        heading, drawn = cells.themed(heading), cells.themed(drawn)
        if self._view.ascii_only:
            heading, drawn = cells.plain_ascii(heading), cells.plain_ascii(drawn)
        if self._heading is None or not self._heading.is_same(heading):
            self._heading = heading
            self.border_title = heading
        if self._shown is None or not self._shown.is_same(drawn):
            before, self._shown = self._shown, drawn
            regions = changed(before, drawn, size.width) if before is not None else [Region(0, 0, size.width, size.height)]
            if regions:
                self.refresh(*regions)


def changed(before: Content, after: Content, width: int) -> list[Region]:
    """Return the parts of lines in which two drawings differ, each one line high.

    Over a slow connection a figure that moves on must not send its whole panel again.
    """
    old, new = before.split("\n", allow_blank=True), after.split("\n", allow_blank=True)
    found = []
    for y in range(max(len(old), len(new))):
        first, last = _difference(old[y] if y < len(old) else Content(""), new[y] if y < len(new) else Content(""), width)
        if last > first:
            found.append(Region(first, y, last - first, 1))
    return found


def _difference(old: Content, new: Content, width: int) -> tuple[int, int]:
    """Return the first cell and the one after the last in which two lines differ, whole words of them.

    It is the whole line where cells are not characters.
    """
    if old.is_same(new):
        return 0, 0
    if old.cell_length != len(old.plain) or new.cell_length != len(new.plain):
        return 0, width
    one, two = _cells(old, width), _cells(new, width)
    differing = [index for index in range(width) if one[index] != two[index]]
    if not differing:
        return 0, 0
    first, last = differing[0], differing[-1] + 1
    while first > 0 and two[first - 1][0] != " ":
        first -= 1
    while last < width and two[last][0] != " ":
        last += 1
    return first, last


def _cells(line: Content, width: int) -> list[tuple[str, Any]]:
    """Return each cell as its character and the styles laid over it, in order."""
    styles: list[tuple[Any, ...]] = [()] * width
    for start, end, style in line.spans:
        for at in range(max(0, start), min(end, width)):
            styles[at] = (*styles[at], style)
    return list(zip(line.plain.ljust(width)[:width], styles, strict=True))

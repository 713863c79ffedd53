"""Rows as they will be trained, one to a screen: trained tokens coloured and marked at the margin, special tokens in sight."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static
from textual.worker import get_current_worker

from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line, safe_text, without_secrets
from qlora_tui.tui.lengths import TOO_LONG, share
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.keys import KeyedScreen, KeyLine, bindings
from qlora_tui.tui.writtenrows import WrittenRow, WrittenRows

if TYPE_CHECKING:
    from qlora_tui.engine.data import Piece
    from qlora_tui.tui.screens.desk import Desk

_MARGIN = 3
_LEAP = 10
_LONGEST = 200_000


class RowsScreen(KeyedScreen):
    """Goes through the rows of the data; nothing can be changed here."""

    place = "rows"
    BINDINGS: ClassVar[list[BindingType]] = bindings("rows")

    def __init__(self, desk: Desk, run: RunConfig, *, ascii_only: bool = False) -> None:
        """Show the rows of `run.data` as its model's template writes them."""
        super().__init__()
        self._desk, self._run, self._ascii = desk, run, ascii_only
        self._rows: WrittenRows | None = None
        scored = desk.scored(run)
        self._known = {number: value for value, number in scored.found} if scored else {}
        self._place = 0
        self._shown: WrittenRow | None = None
        self._told = "reading the tokenizer …"

    def compose(self) -> ComposeResult:
        """Lay out the title, the row and the keys."""
        yield Static("", markup=False, id="row-title")
        with VerticalScroll(can_focus=False, id="row-scroll"):  # its own keys would hide those that go through rows
            yield Static("", markup=False, id="row-text")
        yield KeyLine()

    def on_mount(self) -> None:
        """Begin with the first row."""
        self.set_class(self._ascii, "-ascii")
        self._draw()
        self._open()

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._draw()

    def action_go(self, step: int) -> None:
        """Go to another row."""
        self._go_to(self._place + step)

    def action_end(self, last: int) -> None:
        """Go to the first row or the last one."""
        self._go_to(len(self._rows) if last and self._rows else 0)

    def action_scroll(self, lines: int) -> None:
        """Scroll within a row that is longer than the screen."""
        self.query_one("#row-scroll", VerticalScroll).scroll_relative(y=lines, animate=False)

    def _go_to(self, place: int) -> None:
        if self._rows is None:
            return
        place = max(0, min(place, len(self._rows) - 1))
        if place != self._place:
            self._place = place
            self._write(self._rows, place)

    @work(thread=True, group="row", exclusive=True, exit_on_error=False)
    def _open(self) -> None:
        try:
            rows = self._desk.written(self._run)
            row = rows.at(0) if isinstance(rows, WrittenRows) else None
        except Exception as error:  # noqa: BLE001  a library's error is the person's to read, not the screen's to die of
            rows, row = f"{type(error).__name__}: {without_secrets(error)}", None
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._opened, rows, row)

    def _opened(self, rows: WrittenRows | str, row: WrittenRow | None) -> None:
        if isinstance(rows, str):
            self._told = f"✖ {rows}"
        else:
            self._rows, self._shown = rows, row
        self._draw()

    @work(thread=True, group="row", exclusive=True, exit_on_error=False)
    def _write(self, rows: WrittenRows, place: int) -> None:
        try:
            row = rows.at(place)
        except Exception as error:  # noqa: BLE001  as above
            row = WrittenRow(place + 1, fault=f"{type(error).__name__}: {without_secrets(error)}")
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._have, place, row)

    def _have(self, place: int, row: WrittenRow) -> None:
        if place == self._place:
            self._shown = row
            self.query_one("#row-scroll", VerticalScroll).scroll_home(animate=False)
            self._draw()

    def _draw(self) -> None:
        width = max(20, self.size.width - 2)
        row = self._shown
        if row is None or self._rows is None:
            title = Content.styled("rows as they will be trained", "bold")
            body = [Content.styled(f" {line}", cells.DIM) for line in textwrap.wrap(self._told, width - 1)]
        else:
            title = title_of(row, self._place, len(self._rows), self._run, width, self._known.get(row.number))
            style = "bold" if self.app.no_color else cells.GOOD  # without colours green is a grey that looks less than the rest
            body = lines_of(row, width, mark=">" if self._ascii else "▌", style=style)
        self._put("#row-title", title)
        self._put("#row-text", cells.stack(body))

    def _put(self, where: str, content: Content) -> None:
        self.query_one(where, Static).update(cells.plain_ascii(content) if self._ascii else content)


def title_of(row: WrittenRow, place: int, rows: int, run: RunConfig, width: int, known: float | None = None) -> Content:
    """Return the line that says which row it is, how long, how much of it is trained, and how well the base knows its answer."""
    parts: list[Part] = [(f"row {row.number:,}", f"bold {cells.MAIN}")]
    if not row.fault:
        part = share(row.trained / row.tokens) if row.tokens else "0 %"
        parts.append((f" · {row.tokens:,} tokens · {part} trained", "bold"))
    if row.tokens > run.max_length:
        parts.append((f" · ▲ over {run.max_length:,}: {TOO_LONG[run.too_long]}", cells.WARN))
    if known is not None:
        parts.append((f" · perplexity {known:,.3g}", cells.WARN if known < run.perplexity_filter else ""))
    return cells.row(parts, [(f"{place + 1:,} of {rows:,} usable", cells.DIM)], width)


def lines_of(row: WrittenRow, width: int, *, mark: str, style: str = cells.GOOD) -> list[Content]:
    """Return the row in lines of at most `width` cells: `mark` stands before what is trained, in `style`."""
    if row.fault:
        return [cells.assemble([(f" ✖ this row cannot be trained: {one_line(row.fault, limit=400)}", cells.BAD)])]
    found: list[Content] = []
    for trained, parts in _lines(row.pieces, style):
        margin: Part = (f" {mark} ", style) if trained else (" " * _MARGIN, "")
        wrapped = cells.assemble(parts).wrap(max(10, width - _MARGIN)) or [Content("")]
        found += [cells.assemble([margin]) + line for line in wrapped]
    return found


def _lines(pieces: Sequence[Piece], style: str) -> list[tuple[bool, list[Part]]]:
    """Return the lines of the text, each trained or not as a whole: where that changes within a line, the line is broken there."""
    found: list[tuple[bool, list[Part]]] = []
    fresh = True
    room = _LONGEST
    for piece in pieces:
        if room <= 0:
            found.append((False, [("… the rest is not shown", cells.DIM)]))
            break
        text = safe_text(piece.text, limit=room).expandtabs(4)
        room -= len(text)
        if found and found[-1][0] != piece.trained and not fresh:
            fresh = True
            text = text.removeprefix("\n")  # the break at the border is this one
        for index, part in enumerate(text.split("\n")):
            if fresh or index:
                found.append((piece.trained, []))
                fresh = False
            found[-1][1].append((part, _style(piece, style)))
        if text.endswith("\n"):
            found.pop()
            fresh = True
    return found


def _style(piece: Piece, trained: str) -> str:
    if piece.special:
        return f"dim {trained}" if piece.trained else cells.DIM
    return trained if piece.trained else ""

"""Side by side: a held-out prompt, what base and tuned answered, and two keys to say which is better.

Blind: chance decides which answer stands left, and stays as it was after a restart. The screen reads the run folder and adds
judgements to it; the answers are made by another process, and judging begins with the first of them.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static
from textual.worker import get_current_worker

from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.judge import ME, Answered, Judgement, Pairs, Said, keep_judgement, percents, read_pairs, tally
from qlora_tui.engine.text import one_line, without_secrets
from qlora_tui.tui import answering
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.dialogs import HelpDialog
from qlora_tui.tui.screens.keys import KeyedScreen, KeyLine, bindings, help_of
from qlora_tui.tui.screens.pairlines import pair_lines, summary_lines

_HOW = (
    "Which answer would you rather have? Judge what is right first, then what is to the point, then what is well written.",
    "The tuned answer stands left or right by chance. A tie counts half; what you skip does not count.",
)


class SideBySideScreen(KeyedScreen):
    """Shows pair after pair and keeps what is said of them."""

    place = "side by side"
    BINDINGS: ClassVar[list[BindingType]] = bindings("side by side")

    def __init__(self, folder: Path, rows: int, tokens: int, *, ascii_only: bool = False, make: answering.Make = answering.make) -> None:
        """Judge `rows` prompts of the run in `folder`, with answers of up to `tokens` tokens, which `make` makes."""
        super().__init__()
        self._folder, self._rows, self._tokens, self._ascii, self._make = folder, rows, tokens, ascii_only, make
        self._pairs = Pairs()
        self._place: int | None = None
        self._open: set[str] = set()
        self._whole = False
        self._stop = threading.Event()
        self._doing, self._fault, self._unkept = "looking what is there …", "", ""

    def compose(self) -> ComposeResult:
        """Lay out the title, the pair and the keys."""
        yield Static("", markup=False, id="row-title")
        with VerticalScroll(can_focus=False, id="row-scroll"):
            yield Static("", markup=False, id="row-text")
        yield KeyLine()

    def on_mount(self) -> None:
        """Go on where the last session ended, and have missing answers made."""
        self.set_class(self._ascii, "-ascii")
        self._read()
        self._next()
        self._answer()

    def on_unmount(self) -> None:
        """End the other process with the screen that asked for it."""
        self._stop.set()

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._draw()

    @property
    def _shown(self) -> Answered | None:
        return None if self._place is None or self._place >= len(self._pairs.answers) else self._pairs.answers[self._place]

    @property
    def _seed(self) -> int:
        return self._pairs.sheet.seed if self._pairs.sheet else 0

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only the keys that do something now."""
        shown = self._shown
        if action in ("prefer", "say"):
            return shown is not None and not shown.same and shown.pair not in self._open
        if action == "undo":
            return self._last() is not None
        if action == "reveal":
            return shown is not None and not shown.same and shown.pair not in self._open
        if action == "whole":
            return shown is not None
        if action == "go" and parameters == (1,):
            return shown is not None and (shown.same or shown.pair in self._pairs.mine())
        return True

    def action_prefer(self, side: int) -> None:
        """Say that the left (0) or the right (1) answer is better, and go on."""
        shown = self._shown
        if shown is not None:
            self.action_say("tuned" if shown.tuned_first(self._seed) == (side == 0) else "base")

    def action_say(self, said: Said) -> None:
        """Keep a judgement of the pair shown, and go on to the next one."""
        if (shown := self._shown) is not None and self._keep(shown, said):
            self._next()

    def action_undo(self) -> None:
        """Take the last judgement back and show its pair again."""
        last = self._last()
        if last is not None and self._keep(last, "taken back"):
            self._show(self._pairs.answers.index(last))

    def action_reveal(self) -> None:
        """Show which is which; who has not judged yet no longer can, blind."""
        shown = self._shown
        if shown is not None and (shown.pair in self._pairs.mine() or self._keep(shown, "skip")):
            self._open.add(shown.pair)
            self._draw()

    def action_go(self, step: int) -> None:
        """Look at another pair; nothing is judged by that. Behind the last one is the first that waits, or what came out."""
        place = (len(self._pairs.answers) if self._place is None else self._place) + step
        if place >= len(self._pairs.answers):
            self._next()
        else:
            self._show(max(0, place))

    def action_whole(self) -> None:
        """Show the whole prompt, or its beginning."""
        self._whole = not self._whole
        self._draw()

    def action_scroll(self, lines: int) -> None:
        """Scroll what does not fit."""
        self.query_one("#row-scroll", VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_help(self) -> None:
        """Show the keys."""
        self.app.push_screen(HelpDialog(help_of(self), _HOW))

    def _last(self) -> Answered | None:
        """Return the pair judged last that is still judged; what was revealed first stays left out."""
        mine = self._pairs.mine()
        by_pair = {answer.pair: answer for answer in self._pairs.answers}
        mine = {pair: said for pair, said in mine.items() if pair in by_pair and not (said == "skip" and pair in self._open)}
        said = [found.pair for found in self._pairs.judgements if found.by == ME and found.pair in mine]
        return by_pair[said[-1]] if said else None

    def _keep(self, answer: Answered, said: Said) -> bool:
        try:
            keep_judgement(self._folder, Judgement(answer.pair, answer.row, ME, said))
        except EngineError as error:
            self._unkept = one_line(error, limit=300)
            self._draw()
            return False
        self._unkept = ""
        self._read()
        return True

    def _read(self) -> None:
        self._pairs = read_pairs(self._folder)

    def _next(self) -> None:
        """Show the first pair that nobody has judged; after the last one what came out."""
        mine = self._pairs.mine()
        left = (place for place, answer in enumerate(self._pairs.answers) if not answer.same and answer.pair not in mine)
        self._show(next(left, None))

    def _show(self, place: int | None) -> None:
        self._place, self._whole = place, False
        self.query_one("#row-scroll", VerticalScroll).scroll_home(animate=False)
        self._draw()

    @work(thread=True, group="answers", exclusive=True, exit_on_error=False)
    def _answer(self) -> None:
        def say(done: int, total: int) -> None:
            if not self._stop.is_set():
                told = f"{done:,} of {total:,} answered" if total else "loading the model …"
                self.app.call_from_thread(self._tell, told, "")

        fault = ""
        try:
            answering.check(self._folder)
            self._make(self._folder, self._rows, self._tokens, say, self._stop.is_set)
        except Stopped:
            return
        except EngineError as error:
            fault = one_line(error, limit=600)
        except Exception as error:  # noqa: BLE001  whatever it raises is shown; what was judged stays
            fault = f"{type(error).__name__}: {without_secrets(error)}"
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._tell, "", fault)

    def _tell(self, doing: str, fault: str) -> None:
        if not self.is_mounted:
            return
        self._doing, self._fault = doing, fault or self._fault
        had = self._shown
        self._read()
        if had is None and any(not answer.same and answer.pair not in self._pairs.mine() for answer in self._pairs.answers):
            self._next()
        else:
            self._draw()

    def _draw(self) -> None:
        if not self.is_mounted:
            return
        width = max(20, self.size.width - 2)
        self.refresh_bindings()
        self._put("#row-title", self._title(width))
        told = [cells.assemble([(f" ✖ {fault}", cells.BAD)]) for fault in (self._fault, self._unkept) if fault]
        shown = self._shown
        if shown is None:
            body = summary_lines(self._pairs, width) if self._pairs.answers else [cells.assemble([(f" {line}", "")]) for line in _HOW]
        else:
            said = self._pairs.mine().get(shown.pair)
            room = 0 if self._whole else max(3, self.size.height // 4)
            opened = shown.same or shown.pair in self._open
            body = pair_lines(shown, shown.tuned_first(self._seed), width, prompt_lines=room, said=said, opened=opened)
        self._put("#row-text", cells.stack([*told, *body]))

    def _title(self, width: int) -> Content:
        """Return the line that says which pair it is, how many are judged, and the win rate so far."""
        answers, found = self._pairs.answers, tally(self._pairs, ME)
        mine = self._pairs.mine()
        done = sum(answer.same or answer.pair in mine for answer in answers)
        paired = self._place is not None and answers
        name = f"pair {(self._place or 0) + 1} of {len(answers)}" if paired else "side by side"
        parts: list[Part] = [(name, f"bold {cells.MAIN}")]
        parts.append((f" · {done} done", ""))
        if self._doing:
            parts.append((f" · {self._doing}", cells.DIM))
        rate = f"tuned wins {percents(found)}" if found.wins + found.losses + found.ties else ""
        return cells.row(parts, [(rate.replace("95 % interval ", ""), "bold")] if rate else [], width)

    def _put(self, where: str, content: Content) -> None:
        self.query_one(where, Static).update(cells.plain_ascii(content) if self._ascii else content)

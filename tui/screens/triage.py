"""The triage: what the base already knows and what it finds absurd, seen before anything of it is left out.

Off until chosen. The base scores the answers in a process of its own; what would go is then counted for any threshold at once.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static
from textual.worker import get_current_worker

from qlora_tui.engine.data.perplexity import EXEMPT_TOKENS, USUAL, histogram, most_of, share_for
from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.spec import KEYS, RunConfig
from qlora_tui.engine.text import one_line, without_secrets
from qlora_tui.engine.units import percent
from qlora_tui.tui import words
from qlora_tui.tui.lengths import share
from qlora_tui.tui.panels import cells
from qlora_tui.tui.panels.cells import Part
from qlora_tui.tui.screens.keys import KeyedScreen, KeyLine, bindings

if TYPE_CHECKING:
    from qlora_tui.tui.scoring import Scored
    from qlora_tui.tui.screens.wizard import WizardScreen

_LADDER = (1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)
_LEAST_SHARE = float(str(KEYS["perplexity_drop_most"].default))
_HALF_AN_EPOCH = 0.5
_SHOWN, _SHOWN_TALL = 3, 8
_TALL = 30
_ABOUT = (
    "The base can score every answer by its perplexity. Very low: it would write the answer itself, so training on it costs time and "
    "teaches little; such rows can be left out. Very high: noise, another language, or the new thing to learn; those always stay."
)


class TriageScreen(KeyedScreen):
    """Shows how well the base knows the answers; switches `perplexity_filter` and its two numbers."""

    place = "triage"
    BINDINGS: ClassVar[list[BindingType]] = bindings("triage")

    def __init__(self, wizard: WizardScreen) -> None:
        """Change the run of `wizard`, whose desk has the answers scored."""
        super().__init__()
        self._wizard, self._desk = wizard, wizard.desk
        self._threshold = wizard.run.perplexity_filter or USUAL
        self._stop = threading.Event()
        self._doing = self._fault = ""
        self._answers: Mapping[int, str] = {}

    def compose(self) -> ComposeResult:
        """Lay out the title, what was found and the keys."""
        yield Static("", markup=False, id="row-title")
        with VerticalScroll(can_focus=False, id="row-scroll"):
            yield Static("", markup=False, id="row-text")
        yield KeyLine()

    def on_mount(self) -> None:
        """Show what is known already."""
        self.set_class(self._wizard.ascii_only, "-ascii")
        if self._scored is not None:
            self._read_answers(self._scored)
        self._draw()

    def on_unmount(self) -> None:
        """End the scoring with the screen that asked for it."""
        self._stop.set()

    def on_resize(self) -> None:
        """Break the lines anew."""
        self._draw()

    @property
    def _run(self) -> RunConfig:
        return self._wizard.run

    @property
    def _scored(self) -> Scored | None:
        return self._desk.scored(self._run)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only the keys that do something now."""
        scored = self._scored
        if action == "score":
            return scored is None
        if action == "all":
            more = scored is not None and scored.under(self._threshold) > scored.gone(self._run, self._threshold)
            return more or self._run.perplexity_drop_most > _LEAST_SHARE
        return True

    def action_score(self) -> None:
        """Begin to score, or end it."""
        if self._doing:
            self._stop.set()
            self._doing = "ending it …"
        elif self._wizard.outlook is None:
            self._fault = "the base scores the answers: choose a model first"
        elif self._scored is None:
            self._fault, self._doing = "", "starting …"
            self._stop = threading.Event()
            self._score(self._run, self._stop)
        self._draw()

    def action_switch(self) -> None:
        """Leave out what is under the threshold, or nothing."""
        self._take(perplexity_filter=0.0 if self._run.perplexity_filter else self._threshold)

    def action_threshold(self, direction: int) -> None:
        """Go to the next threshold; what is switched on follows."""
        beyond = [step for step in _LADDER if (step > self._threshold if direction > 0 else step < self._threshold)]
        if beyond:
            self._threshold = min(beyond) if direction > 0 else max(beyond)
            self._take(perplexity_filter=self._threshold if self._run.perplexity_filter else 0.0)

    def action_all(self) -> None:
        """Confirm that more than a fifth of the rows may go, or take that back."""
        scored = self._scored
        if self._run.perplexity_drop_most > _LEAST_SHARE:
            self._take(perplexity_drop_most=_LEAST_SHARE)
        elif scored is not None and scored.under(self._threshold) > most_of(self._run, scored.rows):
            self._take(perplexity_drop_most=min(1.0, share_for(scored.under(self._threshold), scored.rows)))

    def action_scroll(self, lines: int) -> None:
        """Scroll what does not fit."""
        self.query_one("#row-scroll", VerticalScroll).scroll_relative(y=lines, animate=False)

    def _take(self, **changes: float) -> None:
        self._wizard.change(dataclasses.replace(self._run, **changes))  # type: ignore[arg-type]  # two numbers of the table
        self._draw()

    @work(thread=True, group="score", exclusive=True, exit_on_error=False)
    def _score(self, run: RunConfig, stop: threading.Event) -> None:
        def say(doing: str, done: int, total: int) -> None:
            if not stop.is_set():
                self.app.call_from_thread(self._tell, f"{doing}{f': {done:,} of {total:,}' if total else ' …'}", "")

        fault, answers = "", None
        try:
            answers = self._desk.answers(run, _ends(self._desk.score(run, say, stop.is_set)))
        except Stopped:
            fault = "the scoring was ended; s begins anew"
        except EngineError as error:
            fault = one_line(error, limit=600)
        except Exception as error:  # noqa: BLE001  whatever it raises is shown; what was chosen stays
            fault = f"{type(error).__name__}: {without_secrets(error)}"
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._tell, "", fault, answers)

    @work(thread=True, group="answers", exclusive=True, exit_on_error=False)
    def _read_answers(self, scored: Scored) -> None:
        answers = self._desk.answers(self._run, _ends(scored))
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._tell, "", "", answers)

    def _tell(self, doing: str, fault: str, answers: Mapping[int, str] | None = None) -> None:
        self._doing, self._fault = doing, fault
        if answers is not None:
            self._answers = answers
            self._wizard.redraw()
        self._draw()

    def _draw(self) -> None:
        if not self.is_mounted:
            return
        width = max(20, self.size.width - 2)
        self.refresh_bindings()
        self._put("#row-title", title_of(self._run, width))
        told: list[Part] = [(self._fault, cells.BAD)] if self._fault else [(self._doing, cells.MAIN)] if self._doing else []
        head = _lines(_ABOUT, width, "") if self.size.height >= _TALL or self._scored is None else []
        if (scored := self._scored) is not None:
            shown = _SHOWN_TALL if self.size.height >= _TALL else _SHOWN
            body = scored_lines(scored, self._run, self._threshold, width, self._answers, shown)
        else:
            body = [Content(" "), *_invitation(self._cost(), width)]
        news = [*_lines(told[0][0], width, told[0][1]), Content(" ")] if told else []
        self._put("#row-text", cells.stack([*news, *head, *([Content(" ")] if head and scored else []), *body]))

    def _cost(self) -> str:
        """Say how long it takes: a pass forward over the rows is at most half of one that trains."""
        outlook = self._wizard.outlook
        if outlook is None or outlook.time is None:
            return "It takes at most half as long as one epoch."
        seconds = outlook.time.step_seconds[2] * outlook.steps_per_epoch * _HALF_AN_EPOCH
        return f"It takes at most half as long as one epoch, here up to about {words.duration(max(10.0, seconds))} (an estimate)."

    def _put(self, where: str, content: Content) -> None:
        self.query_one(where, Static).update(cells.plain_ascii(content) if self._wizard.ascii_only else content)


def title_of(run: RunConfig, width: int) -> Content:
    """Return the line that says whether anything is left out."""
    on = run.perplexity_filter > 0
    state: Part = (f"● on: under {run.perplexity_filter:g} is left out", f"bold {cells.GOOD}") if on else ("○ off: nothing is left out", "")
    return cells.row([("what the base already knows", f"bold {cells.MAIN}")], [state], width)


def scored_lines(
    scored: Scored, run: RunConfig, threshold: float, width: int, answers: Mapping[int, str], shown: int = _SHOWN
) -> list[Content]:
    """Return the histogram with both ends, what would go at `threshold`, and so many answers at each end."""
    lines = [*_histogram_lines(scored, threshold, width), *_verdict_lines(scored, run, threshold, width)]
    for label, found in (("lowest", scored.found[:shown]), ("highest", scored.found[: -shown - 1 : -1])):
        for place, (value, row) in enumerate(found):
            where = f"{_short(value):>7}  row {row:<6,}"
            parts: list[Part] = [
                (f" {'' if place else label:<10}", cells.DIM),
                (where, ""),
                (one_line(answers.get(row, ""), limit=300), cells.DIM),
            ]
            lines.append(cells.assemble(parts).truncate(width, ellipsis=True))
    return lines


def _histogram_lines(scored: Scored, threshold: float, width: int) -> list[Content]:
    bins = histogram(scored.perplexities, threshold)
    highest = max((rows for _, _, rows in bins), default=0)
    room = max(8, min(50, width - 48))
    lines = [cells.row([(f" {'perplexity':>13}  answers", cells.DIM)], [], width)]
    for place, (low, high, rows) in enumerate(bins):
        goes = high <= threshold
        bar = "█" * -(-rows * room // max(1, highest))
        end = {0: "the base knows these", len(bins) - 1: "it finds these absurd"}.get(place, "")
        span = f"{_short(low)} - {_short(high)}" if high < math.inf else f"{_short(low)} and more"
        parts: list[Part] = [(f" {span:>13}  ", cells.DIM), (bar, cells.WARN if goes else cells.MAIN)]
        parts.append((f" {rows:,}" if rows else " -", "" if rows else cells.DIM))
        parts.append(("  ◂ threshold" if high == threshold else "", cells.WARN))
        lines.append(cells.row(parts, [(end, cells.DIM)] if end else [], width))
    return lines


def _verdict_lines(scored: Scored, run: RunConfig, threshold: float, width: int) -> list[Content]:
    under, gone = scored.under(threshold), scored.gone(run, threshold)
    verb = "go" if run.perplexity_filter else "would go"
    told = f"{gone:,} of {scored.rows:,} rows {verb} ({share(gone / scored.rows) if gone else '0 %'}): perplexity under {threshold:g}"
    lines = [_labelled(f"‹ {threshold:g} ›", told, "bold", width)]
    if under > gone:
        most = f"{percent(run.perplexity_drop_most)} of the rows"
        told = f"{under:,} are under {threshold:g}, but at most {most} go, the lowest first; a allows all"
        lines.append(_labelled("▲", told, cells.WARN, width))
    elif run.perplexity_drop_most > _LEAST_SHARE:
        told = f"up to {percent(run.perplexity_drop_most)} of the rows may go, as you confirmed; a takes that back"
        lines.append(_labelled("", told, "", width))
    if scored.exempt:
        short = "1 answer" if scored.exempt == 1 else f"{scored.exempt:,} answers"
        told = f"{short} under {EXEMPT_TOKENS} tokens {'is' if scored.exempt == 1 else 'are'} not judged"
        lines.append(_labelled("", told, cells.DIM, width))
    lines.append(_labelled("", "what goes is listed in dropped.jsonl beside the run", cells.DIM, width))
    return lines


def _labelled(label: str, told: str, style: str, width: int) -> Content:
    return cells.assemble([(f" {label:<10}", style), (told, style)]).truncate(width, ellipsis=True)


def _invitation(cost: str, width: int) -> list[Content]:
    most, short = percent(_LEAST_SHARE), f"answers under {EXEMPT_TOKENS} tokens stay"
    rules = f"Under {USUAL:g} is usual. At most {most} of the rows go unless you allow more; {short}."
    kept = "What was left out is listed in dropped.jsonl beside the run."
    asked = "s  scores them now, in a process of its own; weights that are not here yet are fetched. Leaving this page ends it."
    blind = "space  switches it on unseen: the run itself scores them first."
    texts = ((f"{rules} {kept}", ""), (f"{asked} {cost}", cells.MAIN), (blind, cells.DIM))
    return [line for text, style in texts for line in (*_lines(text, width, style), Content(" "))]


def _lines(text: str, width: int, style: str) -> list[Content]:
    return [cells.assemble([(f" {line}", style)]) for line in textwrap.wrap(text, width - 2)]


def _ends(scored: Scored) -> list[int]:
    return [row for _, row in (*scored.found[:_SHOWN_TALL], *scored.found[-_SHOWN_TALL:])]


def _short(value: float) -> str:
    """Return a perplexity in at most seven letters.

    >>> _short(1.04), _short(3.0), _short(71.2), _short(15977.4), _short(1e300)
    ('1.04', '3', '71.2', '15,977', '> 1e6')
    """
    if value > 999_999:
        return "> 1e6"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

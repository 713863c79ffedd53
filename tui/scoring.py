"""The base scores every answer before a run, so that a person sees what the triage would leave out and decides.

It is the product's own run in a process and a folder of its own, ended before the first step: what is shown is what the run
would find. The scores stay in the cache, so the run does not measure them again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.engine import child, preset
from qlora_tui.engine.events import Finished, Phase, Prepared
from qlora_tui.engine.journal import EVENTS, Tail
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.spec import KEYS, RunConfig, values_of
from qlora_tui.tui.commands import SCORER
from qlora_tui.tui.probe import refusal

if TYPE_CHECKING:
    from qlora_tui.engine.data import Row

SCORES = "perplexity.jsonl"
"""In the run folder; `engine.train.triage` writes it, and naming it there would load torch here."""
_DOING = {"fetch": "fetching the model", "load": "loading the libraries", "data": "preparing the rows", "plan": "planning"}
_SCORING = "scoring the answers"
_ONCE_PREPARED = {"load": "loading the base", "data": _SCORING}
_MOST = 0.5
_NOT_DECIDING = ("perplexity_filter", "perplexity_drop_most", "skip_bad_rows")


@dataclass(frozen=True, slots=True)
class Scored:
    """How well the base knows the answers: `found` holds (perplexity, row), lowest first, of `rows` training rows.

    Rows that are missing in it are exempt. `prepared` is what a run with these settings would say of its rows.
    """

    rows: int
    found: tuple[tuple[float, int], ...] = ()
    prepared: Prepared | None = None

    @property
    def perplexities(self) -> list[float]:
        """Return those of all answers that were scored, lowest first."""
        return [value for value, _ in self.found]

    @property
    def exempt(self) -> int:
        """Return how many answers are too short to be judged."""
        return self.rows - len(self.found)

    def under(self, threshold: float) -> int:
        """Return how many answers are under `threshold`."""
        return bisect_left(self.found, (threshold, 0))

    def gone(self, run: RunConfig, threshold: float = 0.0) -> int:
        """Return how many rows `run` leaves out, by the rule of the run itself, or would with another threshold."""
        from qlora_tui.engine.data.perplexity import most_of

        return min(self.under(threshold or run.perplexity_filter), most_of(run, self.rows))


def score(
    run: RunConfig,
    *,
    say: Callable[[str, int, int], object] = lambda doing, done, total: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Scored:
    """Let the base score the training answers of `run` in another process.

    Args:
        run: what would be trained; with `perplexity_filter` off the usual threshold is taken and nothing is refused.
        say: hears what is being done, and how far it is, several times a second.
        stopping: asked several times a second; true ends it.

    Raises:
        Stopped: `stopping()` became true.
        EngineError: the run itself said why it could not be, such as a base that does not fit.
    """
    from qlora_tui.engine.data.perplexity import USUAL

    if not run.perplexity_filter:
        run = dataclasses.replace(run, perplexity_filter=USUAL, perplexity_drop_most=_MOST)
    with tempfile.TemporaryDirectory(prefix="qlora-tui-scores-") as place:
        folder = Path(place) / "scores"
        folder.mkdir(mode=0o700)
        text = preset.to_toml(dataclasses.replace(run, skip_bad_rows=True, runs_dir=place, notify=(), report_to=()))
        (folder / RUN_FILE).write_text(text, encoding="utf-8")
        heard = _Heard(folder, say)
        command = [sys.executable, "-P", "-m", "qlora_tui.tui", SCORER, str(folder)]
        ended = child.run(command, doing=_SCORING, stopping=stopping, watch=heard.look)
        heard.look()
        if heard.finished is None or heard.finished.exit_code:
            raise refusal(heard.finished, ended, "the scoring of the answers", "perplexity_filter")
        return heard.scored(folder / SCORES)


def known_words(run: RunConfig, scored: Scored | None) -> str:
    """Return for the data page what is known, and done, about answers that the base knows already."""
    from qlora_tui.engine.data.perplexity import USUAL

    if not run.perplexity_filter:
        under = scored.under(USUAL) if scored else 0
        return f"off; {under:,} answers are under {USUAL:g} (F3)" if scored else "off; F3 finds answers that the base knows already"
    if scored is None:
        return f"answers under {run.perplexity_filter:g} go; F3 says how many: not yet off the rows, steps and time here"
    gone = scored.gone(run)
    return f"{gone:,} of {scored.rows:,} answers go: the base knows them (under {run.perplexity_filter:g})"


def scored_by(run: RunConfig) -> tuple[object, ...]:
    """Return what decides the scores: two runs in which it is the same have the same."""
    chosen = {name: value for name, value in values_of(run).items() if name not in _NOT_DECIDING}
    return tuple(value for name, value in chosen.items() if KEYS[name].group in ("model", "data") or name == "seed")


def document(scored: Scored, run: RunConfig, answers: Callable[[Sequence[int]], dict[int, str]]) -> dict[str, Any]:
    """Return the scores as `qlora-tui data --perplexity --json` tells them; `answers` gives texts by row."""
    from qlora_tui.engine.data.perplexity import EXEMPT_TOKENS, USUAL, histogram

    threshold = run.perplexity_filter or USUAL
    ends = {"lowest": scored.found[:TOLD], "highest": scored.found[: -TOLD - 1 : -1]}
    texts = answers([row for found in ends.values() for _, row in found])
    return {
        "rows": scored.rows,
        "scored": len(scored.found),
        "exempt": scored.exempt,
        "exempt_tokens": EXEMPT_TOKENS,
        "threshold": threshold,
        "under": scored.under(threshold),
        "at_most": run.perplexity_drop_most,
        "left_out": scored.gone(run, threshold),
        "applied": run.perplexity_filter > 0,
        "histogram": [
            {"low": low, "high": high if high < float("inf") else None, "rows": rows}
            for low, high, rows in histogram(scored.perplexities, threshold)
        ],
        **{
            name: [{"row": row, "perplexity": round(value, 4), "text": texts.get(row, "")} for value, row in found]
            for name, found in ends.items()
        },
    }


def answers_of(rows: Iterable[Row], numbers: Sequence[int]) -> dict[int, str]:
    """Return the last answers of those rows that have one of `numbers`."""
    wanted = set(numbers)
    found = {row.number: row.chat.turns for row in rows if row.number in wanted} if wanted else {}
    return {number: next((turn.content for turn in reversed(turns) if turn.role == "assistant"), "") for number, turns in found.items()}


TOLD = 5
"""Answers of each end that are told with their text."""


class _Heard:
    """What the child has told so far."""

    def __init__(self, folder: Path, say: Callable[[str, int, int], object]) -> None:
        self._path, self._say = folder / EVENTS, say
        self._tail: Tail | None = None
        self._doing = ""
        self._first: Prepared | None = None
        self._last: Prepared | None = None
        self.finished: Finished | None = None

    def look(self) -> None:
        """Read on in the journal once there is one."""
        if self._tail is None:
            if not self._path.exists():
                return
            self._tail = Tail(self._path)
        for record in self._tail.records():
            match record.event:
                case Phase(state="begin") as phase:
                    self._doing = (_DOING | _ONCE_PREPARED if self._first else _DOING).get(phase.name, phase.name)
                    self._say(self._doing, 0, phase.total or 0)
                case Phase(state="progress", done=done, total=total):
                    self._say(self._doing, done or 0, total or 0)
                case Prepared() as prepared:
                    self._first, self._last = self._first or prepared, prepared
                case Finished() as finished:
                    self.finished = finished

    def scored(self, path: Path) -> Scored:
        """Return the scores; none are written where every answer is too short."""
        from qlora_tui.engine.data.perplexity import perplexity

        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = sorted((perplexity(row["nll"] / row["tokens"]), int(row["row"])) for row in map(json.loads, lines))
        return Scored(self._first.train_rows if self._first else len(found), tuple(found), self._last)

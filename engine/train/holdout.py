"""The hold-out during a run: measured before step 1, on the way and at the end, in guarded excursions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine import evaluate, shelf
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.events import Evaluated, Event, Phase, Wishes
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import Meter, out_of_memory, said
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.step import Halving

EVAL, BASE = "eval", "base"


def poll_for(wishes: Wishes) -> None:
    """Raise when somebody wants the run to end; called inside every long loop.

    Raises:
        Stopped: "stop" or "abort" was asked for.
    """
    urgent = wishes.urgent()
    if urgent:
        raise Stopped(f"asked to {urgent}")


def _wordless(row: TokenRow) -> tuple[str, str]:
    return "", ""


@dataclass(slots=True)
class Holdout:
    """The held-out rows of a run, and the losses measured so far; `words` gives a row's question and answer as text."""

    folder: Path
    rows: Sequence[TokenRow]
    halving: Halving
    chunk: int
    meter: Meter
    wishes: Wishes
    beside: evaluate.Beside
    words: Callable[[TokenRow], tuple[str, str]] = _wordless
    base: list[RowLoss] = field(default_factory=list)
    newest: list[RowLoss] = field(default_factory=list)
    best: list[RowLoss] = field(default_factory=list)  # the lowest measurement after the base
    best_step: int = 0
    told: Evaluated | None = None  # the newest comparison of base and tuned
    seconds: float = 0.0  # that the last measurement took

    def measure_base(self, loaded: Loaded, fence: Fence) -> Iterator[Event]:
        """Measure the base, adapter off; a resumed run reads what the first attempt measured."""
        self.recall(self.folder)
        self.base = self._known(self._path(BASE))
        if not self.base:
            yield from self.measure(0, loaded, fence)

    def recall(self, folder: Path) -> None:
        """Take up the best measurement that the run in `folder` made of these rows."""
        self.best_step = shelf.marks(folder).best or 0
        self.best = self._known(folder / EVAL / f"step-{self.best_step:06d}.jsonl") if self.best_step else []

    def measure(self, step: int, loaded: Loaded, fence: Fence) -> Iterator[Event]:
        """Measure the hold-out after `step` (0: the base) and say what came out.

        A wish to stop ends the measurement without a result; the loop sees the same wish at its next safe point.

        Raises:
            WontFit: memory ran out and halving did not help.
        """
        if not self.rows:
            return
        began = time.monotonic()
        losses = yield from self.losses(self.rows, loaded, fence, step=step, adapter_off=step == 0)
        self.seconds = time.monotonic() - began if losses else self.seconds
        if losses:
            yield self._remember(step, losses)

    def losses(
        self,
        rows: Sequence[TokenRow],
        loaded: Loaded,
        fence: Fence,
        *,
        step: int,
        adapter_off: bool,
        note: str = "",
        look: Callable[[], None] = lambda: None,
    ) -> Generator[Event, None, list[RowLoss]]:
        """Measure any rows as the hold-out is and return their losses; none if somebody asked to stop, or `look` raised `Stopped`.

        When memory runs out it starts again with half as many rows at once.

        Raises:
            WontFit: halving did not help.
        """
        began = time.monotonic()

        def poll() -> None:
            poll_for(self.wishes)
            look()

        yield Phase("eval", "begin", done=0, total=len(rows), unit="rows", note=note)
        with self.meter.phase("eval", fresh=step == 0):
            losses, words = yield from self._attempt(rows, loaded, fence, poll, note, adapter_off=adapter_off)
            while words:
                yield self.halving.halve(step, words)
                losses, words = yield from self._attempt(rows, loaded, fence, poll, note, adapter_off=adapter_off)
        seconds, told = time.monotonic() - began, self.meter.told("eval")
        yield Phase("eval", "end", done=len(losses), total=len(rows), unit="rows", seconds=seconds, note=note, **told)
        return losses

    def _attempt(
        self, rows: Sequence[TokenRow], loaded: Loaded, fence: Fence, poll: Callable[[], None], note: str, *, adapter_off: bool
    ) -> Generator[Event, None, tuple[list[RowLoss], str]]:
        """Return the losses, none if somebody asked to stop; and the error's words where memory ran out."""
        try:
            with fence.excursion(adapter_off=adapter_off):
                return (yield from self._progress(rows, loaded, poll, note)), ""
        except Stopped:
            return [], ""
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return [], said(error)

    def _progress(
        self, rows: Sequence[TokenRow], loaded: Loaded, poll: Callable[[], None], note: str
    ) -> Generator[Event, None, list[RowLoss]]:
        work = evaluate.measure(loaded, rows, self.halving.rows, poll, chunk=self.chunk, beside=self.beside)
        try:
            while True:
                done = next(work)
                yield Phase("eval", "progress", done=done, total=len(rows), unit="rows", note=note)
        except StopIteration as end:
            losses: list[RowLoss] = end.value
            return losses

    def _remember(self, step: int, losses: list[RowLoss]) -> Evaluated:
        path = self._path(BASE if step == 0 else f"step-{step:06d}")
        where = str(path.relative_to(self.folder))
        try:
            evaluate.write_rows(path, losses)
        except OSError:  # a full disk: the result counts without its rows, and the next save says what is wrong
            where = ""
        if step == 0:
            self.base = losses
        else:
            self.newest = losses
        mean, error = evaluate.mean_loss(losses), evaluate.standard_error([loss.mean for loss in losses])
        if step and math.isfinite(mean) and (not self.best or mean < evaluate.mean_loss(self.best)):
            self.best, self.best_step = losses, step
        if step == 0 or not self.base:
            return Evaluated(step, mean, len(losses), error, where)
        card = evaluate.compare(self.base, losses)
        told = (card.base_loss, card.drop, card.interval, card.better_share, card.verdict)
        self.told = Evaluated(step, mean, len(losses), error, where, *told, worst=self._worst(losses))
        return self.told

    def forget(self, step: int) -> None:
        """Forget the best measurement where it is void: training went back to `step`."""
        if self.best_step > step:
            self.best, self.best_step = [], 0

    def _worst(self, losses: list[RowLoss]) -> tuple[dict[str, Any], ...]:
        """Return the rows that lost most against the base, with their words; of a row in parts, those of the part."""
        lost = evaluate.regressions(self.base, losses)
        places = {id(loss): place for place, loss in enumerate(losses)}
        found = []
        for before, after in lost:
            prompt, answer = self.words(self.rows[places[id(after)]])
            found.append({"row": after.row, "base_loss": before.mean, "loss": after.mean, "prompt": prompt, "answer": answer})
        return tuple(found)

    def _known(self, path: Path) -> list[RowLoss]:
        """Return what an earlier attempt measured, if it was of these rows."""
        known = evaluate.read_rows(path) if path.exists() else []
        return known if [loss.row for loss in known] == [row.row for row in self.rows] else []

    def _path(self, name: str) -> Path:
        return self.folder / EVAL / f"{name}.jsonl"

"""The hold-out during a run: measured before step 1, on the way and at the end, in guarded excursions."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_tui.engine import evaluate
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import Stopped
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.events import Evaluated, Event, Phase, Wishes
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import Meter, out_of_memory, said
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.step import Halving

BASE = "base"


def poll_for(wishes: Wishes) -> None:
    """Raise when somebody wants the run to end; called inside every long loop.

    Raises:
        Stopped: "stop" or "abort" was asked for.
    """
    urgent = wishes.urgent()
    if urgent:
        raise Stopped(f"asked to {urgent}")


@dataclass(slots=True)
class Holdout:
    """The held-out rows of a run, and the losses measured so far."""

    folder: Path
    rows: Sequence[TokenRow]
    halving: Halving
    chunk: int
    meter: Meter
    wishes: Wishes
    beside: evaluate.Beside
    base: list[RowLoss] = field(default_factory=list)
    newest: list[RowLoss] = field(default_factory=list)
    seconds: float = 0.0  # that the last measurement took

    def measure_base(self, loaded: Loaded, fence: Fence) -> Iterator[Event]:
        """Measure the base, adapter off; a resumed run reads what the first attempt measured."""
        path = self._path(BASE)
        if path.exists():
            known = evaluate.read_rows(path)
            if [loss.row for loss in known] == [row.row for row in self.rows]:
                self.base = known
                return
        yield from self.measure(0, loaded, fence)

    def measure(self, step: int, loaded: Loaded, fence: Fence) -> Iterator[Event]:
        """Measure the hold-out after `step` (0: the base) and say what came out.

        A wish to stop ends the measurement without a result; the loop sees the same wish at its next safe point.
        When memory runs out it starts again with half as many rows at once.

        Raises:
            WontFit: halving did not help.
        """
        if not self.rows:
            return
        began = time.monotonic()
        yield Phase("eval", "begin", done=0, total=len(self.rows), unit="rows")
        with self.meter.phase("eval", fresh=step == 0):
            losses, words = yield from self._attempt(step, loaded, fence)
            while words:
                yield self.halving.halve(step, words)
                losses, words = yield from self._attempt(step, loaded, fence)
        seconds, told = time.monotonic() - began, self.meter.told("eval")
        self.seconds = seconds if losses else self.seconds
        yield Phase("eval", "end", done=len(losses), total=len(self.rows), unit="rows", seconds=seconds, **told)
        if losses:
            yield self._remember(step, losses)

    def _attempt(self, step: int, loaded: Loaded, fence: Fence) -> Generator[Event, None, tuple[list[RowLoss], str]]:
        """Return the losses, none if somebody asked to stop; and the error's words where memory ran out."""
        try:
            with fence.excursion(adapter_off=step == 0):
                return (yield from self._progress(loaded)), ""
        except Stopped:
            return [], ""
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return [], said(error)

    def _progress(self, loaded: Loaded) -> Generator[Event, None, list[RowLoss]]:
        work = evaluate.measure(loaded, self.rows, self.halving.rows, lambda: poll_for(self.wishes), chunk=self.chunk, beside=self.beside)
        try:
            while True:
                done = next(work)
                yield Phase("eval", "progress", done=done, total=len(self.rows), unit="rows")
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
        if step == 0 or not self.base:
            return Evaluated(step, mean, len(losses), error, where)
        card = evaluate.compare(self.base, losses)
        return Evaluated(step, mean, len(losses), error, where, card.base_loss, card.drop, card.interval, card.better_share, card.verdict)

    def _path(self, name: str) -> Path:
        return self.folder / "eval" / f"{name}.jsonl"

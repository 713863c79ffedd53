"""Keeps a run's checkpoints: proves the disk before step 1, saves, says when it cannot, and knows which ones count.

Three stay whatever the limit says: the latest, the last healthy one and the best. Healthy is a checkpoint that was
followed by `CLEAN_STEPS` steps without a warning, since a run that is about to break still saves well-formed files.
A full or failing disk never ends a run: the save is left out, told, and tried again at the next one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_tui.engine import checkpoint, shelf
from qlora_tui.engine.errors import CheckpointError, SpaceError
from qlora_tui.engine.events import Event, Finding, MarkedHealthy, Phase, Saved
from qlora_tui.engine.meter import Meter
from qlora_tui.engine.units import gib

CLEAN_STEPS = 10
"""A loss that leaves its baseline is seen within so many steps: notes on the spike rule put it at 1 to 3, drift at 15."""
_BESIDES = 4  # the last healthy one, the next that may become it, the best one, and the one that is being written
_LEAST = 2  # one that is kept while the next is written


@dataclass(slots=True)
class Keeper:
    """The checkpoints of the run in `folder`, `limit` of them beside those that count.

    `step` is the last one saved, `told` the last one of which it was said that it could not be. `waiting` are those that
    are not yet followed by enough clean steps, `bytes` is how large one is, measured.
    """

    folder: Path
    limit: int
    model: PeftModel
    optimizer: torch.optim.Optimizer
    meter: Meter
    step: int = -1
    bytes: int = 0
    waiting: list[int] = field(default_factory=list)
    told: int = -1

    def prove(self, state: Mapping[str, Any]) -> Iterator[Event]:
        """Save once for nothing: it proves the disk, and measures how large a checkpoint is and how many fit.

        Raises:
            SpaceError: a checkpoint cannot be written, or there is no room for two.
        """
        began = time.monotonic()
        yield Phase("save", "begin", note="a checkpoint on trial")
        with self.meter.phase("save"):
            self.bytes = checkpoint.dry_save(self.folder, self.model, self.optimizer, state)
        free = shelf.make_room(self.folder, _LEAST * self.bytes, self.waiting[:1])
        room, kept = (free - shelf.SPARE_BYTES) // max(1, self.bytes), self.limit + _BESIDES
        note = f"a checkpoint takes {gib(self.bytes)}, and the disk has room for {room:,}"
        yield Phase("save", "end", seconds=time.monotonic() - began, note=note, **self.meter.told("save"))
        if room < kept:
            advice = ("make room on this disk", f"save_total_limit={max(1, room - _BESIDES)}")
            message = f"{note}; this run keeps up to {kept}, so older ones will go sooner"
            yield Finding("disk", "warn", max(0, self.step), message, advice, {"free_bytes": free, "checkpoint_bytes": self.bytes})

    def save(self, step: int, state: Mapping[str, Any], *, loss: float | None = None, kind: str = "step") -> Iterator[Event]:
        """Save the checkpoint of `step` unless there is one; a full disk is said and survived.

        Args:
            step: optimizer steps behind us.
            state: what the loop has to remember.
            loss: the hold-out's after this step, in nats a token, where it is the lowest so far: then this is the best checkpoint.
            kind: another one than "step" is kept apart, and nobody resumes from it.
        """
        if step == self.step:
            yield from self._mark(step, **_best(step, loss))
            return
        began = time.monotonic()
        yield Phase("save", "begin")
        fault: SpaceError | CheckpointError | None = None
        with self.meter.phase("save"):
            try:
                shelf.make_room(self.folder, self.bytes, self.waiting[:1])
                path = checkpoint.save(self.folder, step, self.model, self.optimizer, {**state, "waiting": self.waiting}, kind)
                if kind == "step":
                    self._shelve(step, loss)
            except (SpaceError, CheckpointError) as error:
                fault = error
        yield Phase("save", "end", seconds=time.monotonic() - began, **self.meter.told("save"))
        if fault is not None and step == self.told:
            return  # tried again at the same step, and said already
        if fault is not None:
            self.told = step
            advice = ("make room on this disk: training goes on and tries again at the next save",)
            numbers = {"needed_bytes": self.bytes, "saved_step": max(0, self.step)}
            last = f"the last checkpoint is of step {self.step}" if self.step > 0 else "there is no checkpoint yet"
            yield Finding("disk", "warn", step, f"not saved: {fault}; {last}", advice, numbers)
            return
        self.bytes = checkpoint.folder_bytes(path)
        yield Saved(step, str(path.relative_to(self.folder)), self.bytes, "checkpoint" if kind == "step" else "diagnostic")

    def _shelve(self, step: int, loss: float | None) -> None:
        void = tuple(other for other in shelf.marks(self.folder).void if other != step)
        shelf.mark(self.folder, latest=step, void=void, **_best(step, loss))
        self.step = step
        self.waiting.append(step)
        shelf.prune(self.folder, self.limit, self.waiting[:1])
        self._forget_pruned()

    def _forget_pruned(self) -> None:
        """Wait only for checkpoints that are still there: the oldest one stays until it is judged, others may have gone."""
        there = shelf.steps(self.folder)
        self.waiting = [step for step in self.waiting if step in there]

    def better(self, loss: float) -> bool:
        """Say whether `loss` on the hold-out is the lowest so far, in this attempt or an earlier one."""
        known = shelf.marks(self.folder).best_loss
        return math.isfinite(loss) and (known is None or loss < known)

    def judge(self, step: int, findings: Iterable[Finding], *, skipped: bool = False) -> Iterator[Event]:
        """Take in how `step` went: after enough clean ones a checkpoint counts as healthy; one that did not go well voids the wait."""
        if skipped or any(finding.severity != "info" for finding in findings):
            self.waiting.clear()
            return
        ripe = [saved for saved in self.waiting if step - saved >= CLEAN_STEPS]
        if not ripe:
            return
        self.waiting = [saved for saved in self.waiting if saved not in ripe]
        yield from self._mark(step, healthy=ripe[-1])
        yield MarkedHealthy(ripe[-1])

    def _mark(self, step: int, **changes: Any) -> Iterator[Event]:
        if not changes:
            return
        try:
            shelf.mark(self.folder, **changes)
        except SpaceError as error:
            yield Finding("disk", "warn", step, str(error), ("make room on this disk",))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers."""
        self.step = int(state["step"])
        self.waiting = [*(int(step) for step in state.get("waiting", ())), self.step]
        self._forget_pruned()
        shelf.mark(self.folder, latest=self.step)


def _best(step: int, loss: float | None) -> dict[str, Any]:
    return {} if loss is None else {"best": step, "best_loss": loss}

"""The loop: one optimizer step after another, a generator of events.

The loss is summed over supervised tokens and divided once by those of the whole optimizer step, so any split
of a step into micro-batches gives the same step. Side effects other than checkpoints belong to whoever reads
the events; wishes are obeyed between steps and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import torch

from qlora_tui.engine import checkpoint
from qlora_tui.engine.batches import collate, epoch_order, micro_batches, steps_per_epoch, supervised_tokens
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import Diverged, SpaceError
from qlora_tui.engine.events import Event, Finding, Phase, Saved, Stepped, Wishes
from qlora_tui.engine.fast.loss import token_losses
from qlora_tui.engine.forecast import Pace
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.machine import resident_bytes
from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import Holdout
from qlora_tui.engine.train.optim import clip, gradient_norm
from qlora_tui.engine.train.schedule import cadence, learning_rate
from qlora_tui.engine.watch import Watch

EVALS, SAVES = 5, 10
"""How often a run is measured and saved when nobody says otherwise."""


@dataclass(slots=True)
class Loop:
    """One run in memory; `step` counts the optimizer steps behind us."""

    run: RunConfig
    loaded: Loaded
    optimizer: torch.optim.Optimizer
    rows: list[TokenRow]
    holdout: Holdout
    watch: Watch
    fence: Fence
    wishes: Wishes
    total: int
    step: int = 0
    saved_step: int = -1
    _order: tuple[int, list[list[int]]] = (-1, [])
    _pace: Pace = field(default_factory=Pace)

    def train(self) -> Generator[Event, None, str]:
        """Train to the end or until asked to stop; returns "done", "time", "stop" or "abort".

        Raises:
            Diverged: the watch stopped the run; a diagnostic checkpoint was saved.
        """
        began, first = time.monotonic(), self.step
        yield Phase("train", "begin", done=self.step, total=self.total, unit="steps")
        ending = "done"
        while self.step < self.total:
            ending = yield from self._safe_point(time.monotonic() - began if self.step > first else 0.0)
            if ending != "done":
                break
            stepped = self._step(self.step + 1)
            self.step += 1
            yield stepped
            yield from self._judge(stepped)
            yield from self._afterwards(stepped)
        if ending != "abort":
            yield from self.save()
        peak = torch.cuda.max_memory_allocated() if self.loaded.device.type == "cuda" else resident_bytes()
        yield Phase("train", "end", done=self.step, total=self.total, unit="steps", seconds=time.monotonic() - began, peak_bytes=peak)
        return ending

    def save(self) -> Iterator[Event]:
        """Save a checkpoint unless this step has one; a full disk is said and survived."""
        if self.step == self.saved_step or self.step == 0:
            return
        yield Phase("save", "begin")
        began = time.monotonic()
        try:
            state = {"total": self.total, "watch": self.watch.state()}
            path = checkpoint.save(self.holdout.folder, self.step, self.loaded.model, self.optimizer, state)
        except SpaceError as error:
            advice = ("free space on this disk: training goes on and tries again at the next save",)
            yield Finding("disk", "warn", self.step, str(error), advice)
            return
        finally:
            yield Phase("save", "end", seconds=time.monotonic() - began)
        self.saved_step = self.step
        yield Saved(self.step, str(path.relative_to(self.holdout.folder)), checkpoint.folder_bytes(path))
        checkpoint.prune(self.holdout.folder, self.run.save_total_limit)

    def _safe_point(self, trained_seconds: float) -> Generator[Event, None, str]:
        """Between steps: obey wishes, look at the clock; returns why to stop, or "done" to go on.

        However short the time, every attempt takes one step, so that it ends with something saved.
        """
        for wish in self.wishes.take():
            if wish.name == "save":
                yield from self.save()
        urgent = self.wishes.urgent()
        if urgent:
            return urgent
        return "time" if self.run.max_time and trained_seconds >= self.run.max_time else "done"

    def _step(self, step: int) -> Stepped:
        """Compute one optimizer step and apply it if it is finite."""
        began = time.monotonic()
        rows = self._rows_of(step)
        supervised = sum(supervised_tokens(row) for row in rows)
        lr = learning_rate(self.run, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, data_seconds = self._backward(rows, supervised)
        parameters = self.fence.trained
        norm = gradient_norm(parameters)
        finite = math.isfinite(loss) and math.isfinite(norm)
        clipped = False
        if finite:
            self.fence.before_step(supervised)
            clipped = clip(parameters, norm, self.run.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        per_epoch = steps_per_epoch(len(self.rows), rows_per_step(self.run))
        return Stepped(
            step=step,
            total_steps=self.total,
            epoch=step / per_epoch,
            loss=loss,
            grad_norm=norm,
            clipped=clipped,
            skipped=not finite,
            lr=lr,
            tokens=sum(len(row.input_ids) for row in rows),
            supervised_tokens=supervised,
            seconds=time.monotonic() - began,
            data_seconds=data_seconds,
            rows=tuple(row.row for row in rows),
            **_memory(self.loaded.device),
        )

    def _backward(self, rows: list[TokenRow], supervised: int) -> tuple[float, float]:
        """Add up the gradient of a step; returns its loss in nats a token and the seconds spent on batches."""
        total = torch.zeros((), device=self.loaded.device)
        data_seconds = 0.0
        for part in micro_batches(rows, self.run.per_device_train_batch_size):
            began = time.monotonic()
            batch = collate(part, self.loaded.device)
            data_seconds += time.monotonic() - began
            hidden_BTH = self.loaded.hidden(batch.input_ids_BT)
            hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, batch.positions_N)
            loss = token_losses(hidden_NH, self.loaded.head, batch.labels_N).sum() / supervised
            loss.backward()
            total += loss.detach()
        return float(total), data_seconds

    def _rows_of(self, step: int) -> list[TokenRow]:
        per_epoch = steps_per_epoch(len(self.rows), rows_per_step(self.run))
        epoch, index = divmod(step - 1, per_epoch)
        if self._order[0] != epoch:
            lengths = [len(row.input_ids) for row in self.rows]
            self._order = (epoch, epoch_order(lengths, rows_per_step(self.run), self.run.seed, epoch))
        return [self.rows[row] for row in self._order[1][index]]

    def _judge(self, stepped: Stepped) -> Iterator[Event]:
        """Ask the detectors; a stop keeps a diagnostic checkpoint and ends the run."""
        for finding in self.watch.see(stepped):
            yield finding
            if finding.severity == "stop":
                yield from self.save()
                raise Diverged(finding.message, hint=finding.advice[0] if finding.advice else "", where=f"step {stepped.step}")

    def _afterwards(self, stepped: Stepped) -> Iterator[Event]:
        """Say how long it will take, measure the hold-out and save when it is time."""
        self._pace.feed(stepped.seconds, stepped.tokens)
        forecast = self._pace.left(self.step, self.total)
        if forecast is not None:
            yield forecast
        if self.step % cadence(self.run.eval_steps, self.total, EVALS) == 0 and self.step < self.total:
            yield from self.holdout.measure(self.step, self.loaded, self.fence)
        if self.step % cadence(self.run.save_steps, self.total, SAVES) == 0:
            yield from self.save()


def _memory(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {
            "memory_allocated_bytes": torch.cuda.memory_allocated(),
            "memory_reserved_bytes": torch.cuda.memory_reserved(),
            "memory_peak_bytes": torch.cuda.max_memory_allocated(),
        }
    resident = resident_bytes()
    return {"memory_allocated_bytes": resident, "memory_reserved_bytes": resident, "memory_peak_bytes": resident}

"""The loop: one optimizer step after another, a generator of events.

The loss is summed over supervised tokens and divided once by those of the whole optimizer step, so any split
of a step into micro-batches gives the same step. Side effects other than checkpoints belong to whoever reads
the events; wishes are obeyed between steps and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tui.engine.batches import Order, supervised_tokens
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Evaluated, Event, Finding, Phase, Stepped, Wishes
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import Meter
from qlora_tui.engine.rates import Rates
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.timetable import EVALS, SAVES, cadence
from qlora_tui.engine.train import control, verdict
from qlora_tui.engine.train.checks import Checks
from qlora_tui.engine.train.fence import Fence
from qlora_tui.engine.train.holdout import Holdout
from qlora_tui.engine.train.keeper import Keeper
from qlora_tui.engine.train.limits import Limits
from qlora_tui.engine.train.optim import clip, gradient_norm, set_rate
from qlora_tui.engine.train.pause import Pause
from qlora_tui.engine.train.samples import Samples
from qlora_tui.engine.train.schedule import learning_rate
from qlora_tui.engine.train.step import Gradient, Took
from qlora_tui.engine.watch import Watch


@dataclass(slots=True)
class Loop:
    """One run in memory; `step` counts the optimizer steps behind us."""

    run: RunConfig
    loaded: Loaded
    gradient: Gradient
    optimizer: torch.optim.Optimizer
    order: Order
    holdout: Holdout
    meter: Meter
    watch: Watch
    fence: Fence
    wishes: Wishes
    limits: Limits
    keeper: Keeper
    samples: Samples
    checks: Checks
    rates: Rates
    origin: Mapping[str, Any]  # what a resume must find again: settings, data, base
    total: int
    step: int = 0
    rolled_back: int = 0
    pause: Pause = field(default_factory=Pause)
    timed: list[tuple[int, int, float]] = field(default_factory=list)  # tokens, rows and seconds of each step

    def train(self) -> Generator[Event, None, str]:
        """Train to the end or until asked to stop; returns "done", "time", "stop" or "abort".

        Raises:
            Diverged: the watch stopped the run; a diagnostic checkpoint was saved.
            WontFit: memory ran out and halving did not help; the steps before were saved.
        """
        began, first = time.monotonic(), self.step
        yield Phase("train", "begin", done=self.step, total=self.total, unit="steps")
        ending = "done"
        while self.step < self.total:
            ending = yield from self._safe_point(lambda: time.monotonic() - began if self.step > first else 0.0)
            if ending != "done":
                break
            stepped = yield from self._survive(self.step + 1)
            self.step += 1
            yield stepped
            self.timed.append((stepped.tokens, len(stepped.rows), stepped.seconds))
            yield from verdict.judge(self, stepped)
            if self.step == stepped.step:  # not taken back
                yield from self._afterwards(stepped)
        if ending != "abort":
            yield from self.save()
        seconds, told = time.monotonic() - began, self.meter.told("train")
        yield Phase("train", "end", done=self.step, total=self.total, unit="steps", seconds=seconds, **told)
        return ending

    def save(self, *, loss: float | None = None, kind: str = "step") -> Iterator[Event]:
        """Save a checkpoint unless this step has one; a full disk is said and survived."""
        if self.step:
            yield from self.keeper.save(self.step, self.state(), loss=loss, kind=kind)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to remember beside the tensors."""
        halved = {"rows_at_once": self.gradient.halving.rows, "eval_rows": self.holdout.halving.rows}
        rates = {**self.rates.state(), "rolled_back": self.rolled_back}
        scale = {"loss_scale": self.gradient.scale.state()}
        return {"total": self.total, "watch": self.watch.state(), **halved, **rates, **scale, **self.origin}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint remembers: the step, the detectors, and how far memory made batches smaller."""
        self.step = int(state["step"])
        self.watch.restore(state["watch"])
        self.rates.restore(state)
        self.rolled_back = int(state.get("rolled_back", 0))
        self.gradient.scale.restore(state.get("loss_scale", ()))
        self.keeper.restore(state)
        for halving, name in ((self.gradient.halving, "rows_at_once"), (self.holdout.halving, "eval_rows")):
            halving.rows = min(halving.rows, int(state.get(name, halving.rows)))

    def measure(self) -> Generator[Event, None, list[Finding]]:
        """Measure the hold-out and return what the watch says; the best measurement so far is saved if this step was not."""
        found: list[Finding] = []
        if self.pause.unfit:
            return found
        for event in self.holdout.measure(self.step, self.loaded, self.fence):
            yield event
            if isinstance(event, Evaluated):
                found += verdict.measured(self, event)
                if self.keeper.better(event.loss):
                    yield from self.save(loss=event.loss)
        yield from self.samples.usual(self.step)
        return found

    def _survive(self, step: int) -> Generator[Event, None, Stepped]:
        """Take one step and say what memory made of it; when it does not fit at all, the steps before are saved first."""
        stepped: Stepped | WontFit
        try:
            with self.fence.step():
                stepped = self._step(step)
        except WontFit as error:
            stepped = error
        yield from (*self.gradient.tell(step), *self.fence.tell(step))
        if isinstance(stepped, WontFit):
            yield from self.save()
            raise stepped
        return stepped

    def _safe_point(self, trained_seconds: Callable[[], float]) -> Generator[Event, None, str]:
        """Between steps: what people ask, heat and time; returns why to stop, or "done" to go on."""
        return (yield from control.safe_point(self, trained_seconds))

    def _step(self, step: int) -> Stepped:
        """Compute one optimizer step and apply it if it is finite."""
        began = time.monotonic()
        rows = self.order.of(step)
        supervised = sum(supervised_tokens(row) for row in rows)
        lr = learning_rate(self.run, step, self.total) * self.rates.factor
        set_rate(self.optimizer, lr)
        summed, data_seconds = self._backward(rows, supervised)
        length = gradient_norm(self.fence.trained)
        self.fence.after_backward()
        if step < self.total:
            data_seconds += self.gradient.prepare(self.order.of(step + 1), step + 1)
        loss, norm = float(summed), float(length)  # waits for the device, once all that needs no answer is done
        finite = math.isfinite(loss) and math.isfinite(norm)
        clipped = False
        if finite:
            self.fence.before_step(supervised, loss, norm, lr)
            clipped = clip(self.gradient.flat, norm, self.run.max_grad_norm)
            self.optimizer.step()
        self.gradient.clear()
        took = Took(supervised, time.monotonic() - began, data_seconds)
        return Stepped(
            step, self.total, step / self.order.per_epoch, loss, norm, clipped, not finite, lr, **took.told(rows, self.loaded.device)
        )

    def _backward(self, rows: list[TokenRow], supervised: int) -> tuple[torch.Tensor, float]:
        """Add up the gradient of the step; returns its loss in nats a token, on the device, and the seconds spent on batches."""
        return self.gradient.of_step(rows, supervised, self.step + 1)

    def _afterwards(self, stepped: Stepped) -> Iterator[Event]:
        """Measure the hold-out and save when it is time."""
        if self.step % cadence(self.run.eval_steps, self.total, EVALS) == 0 and self.step < self.total:
            yield from verdict.act(self, (yield from self.measure()))
        if self.step == stepped.step and self.step % cadence(self.run.save_steps, self.total, SAVES) == 0:
            yield from self.save()

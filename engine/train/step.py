"""One optimizer step's gradient, in as many parts as memory asks for.

The loss is summed over supervised tokens and divided once by those of the whole step, so any split of the rows gives
the same step. That is what makes running out of memory survivable: the same rows go through again in halves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qlora_tui.engine.batches import Batch, Order, micro_batches
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Finding
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.graphs import Graphs
from qlora_tui.engine.fast.loss import token_losses
from qlora_tui.engine.fast.offload import Offload
from qlora_tui.engine.fast.recompute import offloading
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.meter import RandomState, empty_cache, in_use, out_of_memory, said
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import Kind
from qlora_tui.engine.train.scale import LossScale

MOST_HALVINGS = 3
"""Beyond this the estimate was wrong by a factor of eight: the run ends rather than crawl."""
_THRASHING_STEPS = 3


@dataclass(slots=True)
class Halving:
    """How many rows go through at once; halved when memory runs out, and never raised again in this run."""

    what: str
    rows: int
    device: torch.device
    refuse: Callable[[str], WontFit]
    times: int = 0

    def halve(self, step: int, words: str) -> Finding:
        """Halve the rows at once and say so. Call it outside the `except` block: its exception holds every tensor of the attempt.

        Raises:
            WontFit: one row does not fit, or it was halved too often already.
        """
        empty_cache(self.device)
        if self.rows == 1 or self.times == MOST_HALVINGS:
            often = f" after {self.times} halvings" if self.times else ""
            raise self.refuse(f"out of memory in {self.what} with {_rows(self.rows)} at once{often}")
        before, self.rows = self.rows, -(-self.rows // 2)
        self.times += 1
        message = f"out of memory in {self.what} with {_rows(before)} at once: the same rows again, {self.rows} at once from here on"
        advice = (f"per_device_train_batch_size={self.rows} with as many rows a step, next time", "close other programs on this device")
        numbers = {"rows_before": before, "rows_at_once": self.rows, "halvings": self.times, "said": words}
        return Finding("memory", "warn", step, f"{message}; the result stays the same", advice, numbers | in_use(self.device))


@dataclass(slots=True)
class Thrash:
    """Looks for an allocator that has to empty its cache again and again: near the limit a step takes ten times as long."""

    device: torch.device
    retries: int = -1
    steps: int = 0

    def see(self, step: int) -> list[Finding]:
        """Return one warning, once, after a few steps that each made the allocator start over."""
        if self.device.type != "cuda":
            return []
        now = allocator_retries()
        self.steps += 0 <= self.retries < now  # what happened before the first step is not counted
        self.retries = now
        if self.steps != _THRASHING_STEPS:
            return []
        self.steps += 1  # said once
        message = f"memory is nearly full: the allocator had to empty its cache {now} times, and each time costs a good part of a step"
        advice = ("recompute more layers or take fewer rows at once, next time", "close other programs on this device")
        return [Finding("memory", "warn", step, message, advice, {"retries": now} | in_use(self.device))]


@dataclass(slots=True)
class Gradient:
    """Computes the gradient of a step, and remembers what a person should know of it until the loop says it."""

    loaded: Loaded
    flat: Flat[Kind]
    halving: Halving
    chunk: int
    thrash: Thrash
    scale: LossScale = field(default_factory=LossScale)
    graphs: Graphs | None = None  # records batches and replays them; None where each kernel is started by itself
    _order: Order | None = None
    _found: list[Finding] = field(default_factory=list)
    _warm: bool = False
    _first: tuple[int, int, Batch] | None = None  # the first batch of the step to come, of so many rows

    def of_step(self, rows: Sequence[TokenRow], supervised: int, step: int) -> tuple[torch.Tensor, float]:
        """Add up the gradient of a step; returns its loss in nats a token, on the device, and the seconds spent on batches.

        When memory runs out the same rows go through again in halves, and when a gradient in float16 overflows under a smaller loss
        scale; both on the random numbers of the first attempt.

        Raises:
            WontFit: halving did not help; gradients are gone and random numbers are those of the step's start.
        """
        start = RandomState.now()
        while True:
            factor = self.scale.factor
            done, words = self._attempt(rows, supervised / factor, self._prepared(step))
            if done is not None:
                if self.scale.settle(self.flat):
                    return (done[0] / factor if self.scale.lifts else done[0]), done[1]
                self.clear()
                start.restore()
                continue
            self.release()
            start.restore()
            self._found.append(self.halving.halve(step, words))
            self.record(self._order if self.graphs is not None else None)

    def prepare(self, rows: Sequence[TokenRow], step: int) -> float:
        """Make the first batch of `step` while the device works on the one before; returns the seconds spent.

        Later ones of a step are made so anyway; before the first the device would wait.
        """
        began, size = time.monotonic(), self.halving.rows
        with suppress(torch.OutOfMemoryError):  # it is made when its step comes, where that is survived
            self._first = step, size, self.loaded.batch(micro_batches(rows, size)[0])
        return time.monotonic() - began

    @property
    def recordings(self) -> int:
        """Return how many batches were recorded so far: each makes its step longer, and those after it not."""
        return 0 if self.graphs is None else self.graphs.recordings

    def record(self, order: Order | None) -> None:
        """Record batches of the rows of `order` from now on; with None, start each kernel by itself."""
        self.release()
        self.graphs, self._order = None, order
        if order is None:
            return
        packs = self.loaded.packs
        lengths = order.totals(self.halving.rows) if packs else order.row_lengths
        longest = max(order.row_lengths) if packs else 0
        self.graphs = Graphs(self.loaded.model, self.flat, self.losses, lengths, longest=longest)
        if self._offload is not None:
            width = self.loaded.head.weight_VH.shape[1] * self.loaded.dtype.itemsize
            self._offload.least = max(lengths) * (1 if packs else self.halving.rows) * width

    def clear(self) -> None:
        """End a step: take the gradients back, and their memory too unless recorded batches write to that very place."""
        if self.graphs is None:
            self.flat.release()
        else:
            self.flat.clear()

    def release(self) -> None:
        """Let go of recorded batches, gradients and pinned RAM: their memory is free, and what they were made of may change."""
        if self.graphs is not None:
            self.graphs.release()
        self.flat.release()  # after the graphs: a recorded batch writes to where the gradients were
        self._first, self._warm = None, False
        if self._offload is not None:
            self._offload.release()

    @property
    def _offload(self) -> Offload | None:
        """Return what holds inputs of layers in RAM, if anything does."""
        layers = self.loaded.decoder.layers
        assert isinstance(layers, torch.nn.ModuleList)
        return offloading(layers)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let an evaluation use the memory of recorded batches, which lies idle between them."""
        with nullcontext() if self.graphs is None else self.graphs.beside():
            yield

    def tell(self, step: int) -> list[Finding]:
        """Return what memory made of `step`, once."""
        found, self._found = self._found, []
        return found + self.thrash.see(step)

    def add(self, rows: Sequence[TokenRow], supervised: float, first: Batch | None = None) -> tuple[torch.Tensor, float]:
        """Add the gradient of `rows` to what is there, `halving.rows` at a time; an out-of-memory error is the caller's.

        Returns:
            The summed loss over `supervised`, on the device, and the seconds spent on making batches, but for the `first`.
        """
        total = torch.zeros((), device=self.loaded.device)
        data_seconds = 0.0
        for part in micro_batches(rows, self.halving.rows):
            began = time.monotonic()
            batch, first = first or self.loaded.batch(part), None
            data_seconds += time.monotonic() - began
            total += self._backward(batch, supervised)
        return total, data_seconds

    def _prepared(self, step: int) -> Batch | None:
        """Return the first batch of `step` if it was made for as many rows at once as there are now, and let go of it."""
        prepared, self._first = self._first, None
        if prepared is None:
            return None
        known, size, batch = prepared
        return batch if (known, size) == (step, self.halving.rows) else None

    def _backward(self, batch: Batch, supervised: float) -> torch.Tensor:
        """Add the gradient of one batch and return its loss over `supervised`.

        The first batch of a run goes the plain way also where the others are replayed: libraries choose kernels and make
        workspaces at their first use, which no graph may hold.
        """
        if self.graphs is not None and self._warm:
            try:
                return self.graphs.add(batch, supervised)
            except RuntimeError as error:
                if out_of_memory(error) or not self.graphs.why_not:
                    raise
                why_not = self.graphs.why_not
            self._give_up(why_not)
        self.flat.lend()
        loss = self.losses(batch).sum() / supervised
        loss.backward()
        if self.graphs is not None and not self._warm:
            self._warm = True
            empty_cache(self.loaded.device)  # graphs have a pool of their own
        return loss.detach()

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the loss of each supervised token [N]; no name holds hidden states when its backward pass begins.

        The backward pass does not read them. The supervised ones are a copy, and the rest is dropped before logits are made.
        """
        hidden_BTH = self.loaded.hidden(batch.input_ids_BT, batch.blocks)
        hidden_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).index_select(0, batch.positions_N)
        del hidden_BTH
        return token_losses(hidden_NH, self.loaded.head, batch.labels_N, self.chunk)

    def _give_up(self, why_not: str) -> None:
        """Go on without recording; nothing of a batch that could not be recorded was computed."""
        self.graphs = None
        empty_cache(self.loaded.device)  # what the recording left behind
        told = f"batches cannot be recorded as CUDA graphs here, so each kernel is started by itself: {why_not}"
        self._found.append(Finding("graphs", "info", 0, told, (), {}))

    def _attempt(self, rows: Sequence[TokenRow], supervised: float, first: Batch | None) -> tuple[tuple[torch.Tensor, float] | None, str]:
        """Return what `add` returns, or None and the error's words; the error itself, with its frames, ends here."""
        try:
            return self.add(rows, supervised, first), ""
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None, said(error)


@dataclass(frozen=True, slots=True)
class Took:
    """What one step took: tokens that it learned from, and seconds, of which `data_seconds` went into making batches."""

    supervised_tokens: int
    seconds: float
    data_seconds: float

    def told(self, rows: Sequence[TokenRow], device: torch.device) -> dict[str, Any]:
        """Return that, and what the step's rows and the memory say, as fields of `Stepped`."""
        tokens = sum(len(row.input_ids) for row in rows)
        return {**asdict(self), "tokens": tokens, "rows": tuple(row.row for row in rows), **in_use(device)}


def recorded(run: RunConfig, loaded: Loaded) -> bool:
    """Say whether batches are recorded as CUDA graphs: chosen by the planner, and only a card can."""
    return run.cuda_graphs == "on" and loaded.device.type == "cuda"


def allocator_retries() -> int:
    """Return how often torch's allocator gave its cache back to satisfy a request."""
    return int(torch.cuda.memory.memory_stats_as_nested_dict().get("num_alloc_retries", 0))


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"

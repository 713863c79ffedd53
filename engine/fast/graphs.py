"""A micro-batch as one CUDA graph: its thousands of kernels are handed over at once.

Python needs 25 to 50 microseconds for each kernel of a forward and backward pass, and a card is often done sooner: a
0.5 B model's kernels take a tenth of what their launches take. Recorded once for each shape of a batch and then
replayed, a micro-batch takes what the card takes. The numbers are the same kernels' on the same tensors.

A graph reads and writes fixed addresses. So inputs are copied into tensors of its own, gradients lie in one buffer
that is lent to the parameters (`flat`), and lengths and numbers of supervised tokens are rounded up to a few sizes. All graphs
share one pool of memory, which is as large as the largest of them needs, and only one of them runs at a time.

Of rows that lie end to end the sum of their lengths is rounded up: what is left over is one more row, of which nothing is learned.

Shapes: B rows, T tokens of the longest row, N supervised tokens.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from qlora_tui.engine.batches import Batch, Blocks
from qlora_tui.engine.fast import softcap
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.meter import empty_cache, out_of_memory
from qlora_tui.engine.text import one_line

SIZES = 12
"""Row lengths that are told apart: each more saves padding and costs a recording, which takes about as long as a step."""
MOST_HELD = 24
_SUPERVISED_PARTS = 4  # the number of supervised tokens is rounded up to so many parts of all

Losses = Callable[[Batch], torch.Tensor]
"""A batch in; the loss of each supervised token [N] out, differentiable."""


class Shape(NamedTuple):
    """What one graph is made for; `blocks` are the rows that lie end to end in its one, 0 where they are padded."""

    rows: int
    length: int
    supervised: int
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class _Pool:
    """Names the memory that graphs share; torch's own MemPool ends the process when it goes after a recording that failed."""

    id: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    own: Batch
    shares_N: torch.Tensor
    loss: torch.Tensor

    def fill(self, batch: Batch, supervised: float) -> None:
        """Copy a batch in; what is padded counts nothing."""
        fill(self.own, batch)
        self.shares_N.zero_()
        self.shares_N[: len(batch.labels_N)].fill_(1.0 / supervised)


class Graphs:
    """Records micro-batches by shape and replays them; falls back to the plain way where one cannot be recorded."""

    def __init__(self, module: torch.nn.Module, flat: Flat[Any], losses: Losses, lengths: Sequence[int], *, longest: int = 0) -> None:
        """Serve batches of `lengths` tokens a row; nothing is recorded and no memory is taken before the first batch.

        Args:
            module: what the losses come from; a batch that changes its buffers cannot be recorded.
            flat: the parameters that are trained, and their gradients.
            losses: the work of a forward pass.
            lengths: tokens of every row, or of every batch where its rows lie end to end.
            longest: tokens of the longest row where rows lie end to end; 0 where they are padded.
        """
        self._module, self._flat, self._device, self._losses = module, flat, flat.device, losses
        self.sizes = sizes(lengths)
        self._longest = max(longest, *(above - below for below, above in pairwise([0, *self.sizes])))  # what is left over is a row too
        self._held: dict[Shape, _Recorded] = {}
        self._pool: _Pool | None = None
        self.why_not = ""
        self.recordings = 0

    def shape(self, batch: Batch) -> Shape:
        """Return the shape of the graph that serves `batch`."""
        rows, longest = batch.input_ids_BT.shape
        at = bisect.bisect_left(self.sizes, longest)
        length = self.sizes[at] if at < len(self.sizes) else longest
        part = -(-rows * length // _SUPERVISED_PARTS)
        blocks = 0 if batch.blocks is None else len(batch.blocks.bounds) - 1
        return Shape(rows, length, min(rows * length, -(-len(batch.labels_N) // part) * part), blocks)

    def add(self, batch: Batch, supervised: float) -> torch.Tensor:
        """Add the gradient of `batch` to the parameters' and return its summed loss over `supervised`.

        Raises:
            torch.OutOfMemoryError: a recording did not fit; all are let go.
            RuntimeError: a recording failed for another reason, which `why_not` names; the plain way is left.
        """
        shape = self.shape(batch)
        recorded = self._held.pop(shape, None) or self._record(shape)
        self._held[shape] = recorded  # the last used is last
        if len(self._held) > MOST_HELD:
            del self._held[next(iter(self._held))]
        self._flat.empty()
        recorded.fill(batch, supervised)
        recorded.graph.replay()
        self._flat.lend()  # the device is at work by now
        return recorded.loss.clone()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Let other work of this thread use the pool's memory: between two batches nothing in it is in use.

        What that work makes must be gone, or on the processor, before the next batch is replayed.
        """
        if self._pool is None:
            yield
            return
        here, stream = torch.cuda.current_stream(), _stream(self._device)
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._pool):  # type: ignore[arg-type]  # it reads the id alone
                yield
        finally:  # also after an error: the next batch is replayed on the same memory
            softcap.forget_tiles()
            here.wait_stream(stream)

    def release(self) -> None:
        """Let go of every graph, so that other work finds their memory free; until then gradients must stay where they are."""
        if self._pool is None:
            return
        self._held.clear()
        self._pool = None
        empty_cache(self._device)

    def _record(self, shape: Shape) -> _Recorded:
        device = self._device
        self._flat.lend()
        here, stream = torch.cuda.current_stream(device), _stream(device)
        if self._pool is None:
            self._pool = _Pool(torch.cuda.graph_pool_handle())
        own = empty(shape, self._longest, device)
        shares_N = torch.zeros(shape.supervised, device=device)
        graph, buffers = torch.cuda.CUDAGraph(), _addresses(self._module)
        generator = torch.cuda.default_generators[_index(device)]
        numbers = generator.clone_state()
        stream.wait_stream(here)
        softcap.forget_tiles()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(self._pool.id, capture_error_mode="thread_local")  # type: ignore[arg-type]  # torch's own example
                try:
                    loss = (self._losses(own) * shares_N).sum()
                    loss.backward()
                    loss = loss.detach()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.release()
            generator.graphsafe_set_state(numbers)  # the recording that broke left its own one waiting for an end that never comes
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error  # ending a recording that broke raises too
            if not out_of_memory(cause):
                self.why_not = one_line(cause, limit=200)
            raise cause from None
        finally:
            softcap.forget_tiles()
        here.wait_stream(stream)
        if _addresses(self._module) != buffers:
            self.release()
            self.why_not = "the model makes its buffers anew while it runs"
            raise RuntimeError(self.why_not)
        self.recordings += 1
        return _Recorded(graph, own, shares_N, loss)


def empty(shape: Shape, longest: int, device: torch.device) -> Batch:
    """Return a batch of `shape` that nothing was copied into: where rows lie end to end, with one more for what is left over.

    No row in it, that one included, may be longer than `longest`.
    """
    ids_BT = torch.zeros(shape.rows, shape.length, dtype=torch.long, device=device)
    positions_N = torch.arange(shape.supervised, device=device)
    labels_N = torch.zeros(shape.supervised, dtype=torch.long, device=device)
    blocks = None
    if shape.blocks:
        bounds = torch.full((shape.blocks + 2,), shape.length, dtype=torch.int32, device=device)
        bounds[0] = 0
        blocks = Blocks(torch.arange(shape.length, device=device)[None], bounds, longest)
    return Batch(ids_BT, positions_N, labels_N, [], shape.rows * shape.length, blocks)


def fill(own: Batch, batch: Batch) -> None:
    """Copy `batch` into a larger one; of what is left over nothing is learned, and no row sees it."""
    rows, length = batch.input_ids_BT.shape
    if batch.input_ids_BT.shape != own.input_ids_BT.shape:
        own.input_ids_BT.zero_()
    own.input_ids_BT[:rows, :length].copy_(batch.input_ids_BT)
    number, size = len(batch.labels_N), own.input_ids_BT.shape[1]
    positions_N = batch.positions_N if length == size else batch.positions_N // length * size + batch.positions_N % length
    own.positions_N[:number].copy_(positions_N)
    own.labels_N[:number].copy_(batch.labels_N)
    if own.blocks is not None and batch.blocks is not None:
        own.blocks.places_1T[:, :length].copy_(batch.blocks.places_1T)
        own.blocks.places_1T[:, length:].copy_(torch.arange(size - length, device=own.input_ids_BT.device)[None])
        own.blocks.bounds.fill_(size)
        own.blocks.bounds[: len(batch.blocks.bounds)].copy_(batch.blocks.bounds)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that batches are recorded on: one for good, since cuBLAS keeps a workspace for each it ever saw."""
    return torch.cuda.Stream(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _addresses(module: torch.nn.Module) -> list[int]:
    return [buffer.data_ptr() for buffer in module.buffers()]


def sizes(lengths: Sequence[int], number: int = SIZES) -> list[int]:
    """Return at most `number` lengths, ascending, so that about as many rows are rounded up to each; the longest is one.

    >>> sizes([10, 20, 30, 40], 2)
    [20, 40]
    """
    ordered = sorted(lengths)
    return sorted({ordered[-(-len(ordered) * part // number) - 1] for part in range(1, number + 1)})

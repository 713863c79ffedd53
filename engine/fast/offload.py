"""Inputs of checkpointed layers in the machine's memory: out during the forward pass, back one layer ahead of its use.

A checkpointed layer keeps its input alone, which for a row of 65,536 tokens and a hidden size of 4,096 is still half a
GiB for each layer. Copies run on streams of their own beside the computation, and streams race silently, so each order
that matters is an event: a copy out waits for what made its source; a copy back waits for the copy out and for whoever had
its target's memory before; what reads waits for the copy back. A block of the device is let go only after the stream that
computes was told to wait for the copy: the allocator hands it to that stream again, and so after the copy. A buffer of the
host is given back after that too, so whoever writes into it next, later in that stream, needs no event of the copies before.
So no event outlives a batch, and a batch can be recorded as a CUDA graph, copies and all: what it waits for is in it.

On a processor the same class makes plain copies, so that its logic has tests.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """What is used of a `torch.cuda.Stream`."""

    def wait_event(self, event: Any) -> None:
        """Do nothing handed over from now on before `event` has happened."""

    def record_event(self) -> Any:
        """Return an event that happens when all handed over so far is done."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Buffer:
    """A buffer of the host."""

    bytes: torch.Tensor

    def as_tensor(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return its first bytes as a tensor."""
        return self.bytes[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class Streams(Protocol):
    """Where copies run, and the memory of the host that they need."""

    out: Lane
    back: Lane
    device: torch.device

    def current(self) -> Lane:
        """Return the stream that computes."""

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
        """Hand a copy over to `lane`."""

    def buffer(self, size: int) -> Buffer:
        """Return at least `size` bytes of the host's memory."""


class Offload:
    """Keeps the inputs of a model's checkpointed layers in buffers of the host, which are used again at every batch.

    There are as many buffers as inputs were away at once, each as large as the largest that it held, and of `least` bytes: rows
    of many lengths need no more than the longest do. A recorded batch copies to the places that it was recorded with, so before
    batches are recorded `least` must be the bytes of the largest, and one batch must have gone through.
    """

    def __init__(self, streams: Streams) -> None:
        """Take no memory yet."""
        self.streams = streams
        self.least = 0
        self._free: list[Buffer] = []
        self._last: weakref.ref[_Kept] | None = None
        self._lent = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the host held for later batches."""
        return sum(buffer.bytes.nbytes for buffer in self._free)

    @property
    def lent(self) -> int:
        """How many buffers hold an input now; none between two batches."""
        return self._lent

    def hooks(self, source: torch.Tensor, index: int, number: int) -> torch.autograd.graph.saved_tensors_hooks:
        """Return the context in which layer `index` of `number` checkpointed ones saves its input `source`.

        The last one's input stays: the backward pass begins with it.
        """
        place = source.data_ptr()

        def pack(tensor: torch.Tensor) -> Any:
            return self._keep(tensor.detach(), index, number) if tensor.data_ptr() == place else tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    def release(self) -> None:
        """Give the buffers back to the host; those that hold an input are kept."""
        self._free.clear()

    def _keep(self, source: torch.Tensor, index: int, number: int) -> _Kept:
        before = None if self._last is None or index == 0 else self._last()
        if before is not None:
            before.leave()
        kept = _Kept(self, source, before)
        self._last = weakref.ref(kept)
        if index < number - 1:
            kept.send()
        return kept

    def take(self, size: int) -> Buffer:
        """Return a free buffer of at least `size` bytes; one that was outgrown makes room for a new one."""
        fitting = [buffer for buffer in self._free if buffer.bytes.nbytes >= size]
        if fitting:
            buffer = min(fitting, key=lambda one: one.bytes.nbytes)
            self._free.remove(buffer)
        else:
            if self._free:
                self._free.remove(max(self._free, key=lambda one: one.bytes.nbytes))
            buffer = self.streams.buffer(max(size, self.least))
        self._lent += 1
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back, after its copies in the stream that computes."""
        self._lent -= 1
        self._free.append(buffer)


class _Kept:
    """One input, wherever it is; autograd holds this in its place, and when autograd lets go, however that comes, all is given back."""

    def __init__(self, offload: Offload, source: torch.Tensor, below: _Kept | None) -> None:
        self._offload, self._streams = offload, offload.streams
        self._shape, self._dtype = source.shape, source.dtype
        self._here: torch.Tensor | None = source
        self._arriving: torch.Tensor | None = None
        self._buffer: Buffer | None = None
        self._gone: Any = None  # when the copy out is done
        self._came: Any = None  # when the copy back is
        self._compute = self._streams.current()
        self._below = None if below is None else weakref.ref(below)

    def send(self) -> None:
        """Begin the copy out; the input stays until `leave`."""
        assert self._here is not None
        buffer, out = self._offload.take(self._here.nbytes), self._streams.out
        self._buffer = buffer
        out.wait_event(self._compute.record_event())
        self._streams.copy(out, buffer.as_tensor(self._shape, self._dtype), self._here)
        self._gone = out.record_event()

    def leave(self) -> None:
        """Let go of the input on the device once its copy is done; one that was not sent stays."""
        if self._buffer is not None and self._here is not None:
            self._compute.wait_event(self._gone)
            self._here = None

    def fetch(self) -> None:
        """Begin the copy back, unless the input is there or on its way."""
        if self._buffer is None or self._here is not None or self._arriving is not None:
            return
        back = self._streams.back
        target = torch.empty(self._shape, dtype=self._dtype, device=self._streams.device)
        back.wait_event(self._gone)
        back.wait_event(self._compute.record_event())  # the target's memory may still be in use by what was computed before
        self._streams.copy(back, target, self._buffer.as_tensor(self._shape, self._dtype))
        self._came = back.record_event()
        self._arriving = target

    def there(self) -> torch.Tensor:
        """Return the input for whoever computes with it next, and begin to fetch the one below."""
        self.fetch()
        if self._arriving is not None:
            self._compute.wait_event(self._came)
        tensor, self._arriving = self._arriving if self._here is None else self._here, None
        assert tensor is not None
        below = None if self._below is None else self._below()
        if below is not None:
            below.fetch()
        return tensor

    def __del__(self) -> None:
        """Give everything back, in whatever state: a fault between forward and backward ends here too."""
        if self._buffer is None:
            return
        self.leave()
        if self._arriving is not None:
            self._compute.wait_event(self._came)
            self._arriving = None
        self._offload.give(self._buffer)


def _unpack(kept: Any) -> torch.Tensor:
    tensor: torch.Tensor = kept.there() if isinstance(kept, _Kept) else kept
    return tensor


def streams_of(device: torch.device) -> Streams:
    """Return the copies that a device makes: beside the computation on a card, plain ones on a processor."""
    return CudaStreams(device) if device.type == "cuda" else _Inline()


class CudaStreams:
    """Two streams beside the one that computes: out and back use the bus in two directions at once."""

    def __init__(self, device: torch.device) -> None:
        """Make both streams."""
        self.device = device
        self.out: Lane = torch.cuda.Stream(device)
        self.back: Lane = torch.cuda.Stream(device)

    def current(self) -> Lane:
        """Return the stream that computes; the backward pass runs on that of the forward pass."""
        return torch.cuda.current_stream(self.device)

    def copy(self, lane: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy without the host waiting for it, which pinned memory alone allows."""
        with torch.cuda.stream(lane):
            target.copy_(source, non_blocking=True)

    def buffer(self, size: int) -> Buffer:
        """Return pinned bytes, to the page: torch's own pinned memory comes in powers of two, up to twice what is asked for.

        Raises:
            torch.OutOfMemoryError: the system does not pin so much.
            RuntimeError: a batch is being recorded; one that had a smaller buffer would go on copying to where it was.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a recorded batch finds no buffer of {size:,} bytes in RAM")
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # pages of its own: none can be pinned twice, and torch takes a tensor for pinned by where its storage begins
        pages = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(pages.data_ptr(), size, 0)
        if code != runtime.cudaError.success:
            with contextlib.suppress(RuntimeError):  # CUDA remembers a refusal, and the next kernel, whatever it is, would raise it
                torch.zeros(1, device=self.device)
            raise torch.OutOfMemoryError(f"out of memory: the system does not pin {size:,} more bytes of RAM ({code})")
        buffer = Buffer(pages)
        weakref.finalize(buffer, _unpin, self.device, pages.data_ptr()).atexit = False  # the driver's own end unpins all
        return buffer


def _unpin(device: torch.device, place: int) -> None:
    """Undo the pinning of a buffer before its memory goes; no copy may be on its way then."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(place)


class _AtOnce:
    """A stream of a processor: what is handed over is done."""

    def wait_event(self, event: Any) -> None:
        """Wait for nothing."""

    def record_event(self) -> bool:
        """Return what stands for an event that happened."""
        return True


class _Inline:
    """Plain copies."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.out: Lane = _AtOnce()
        self.back: Lane = _AtOnce()

    def current(self) -> Lane:
        return self.out

    def copy(self, lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def buffer(self, size: int) -> Buffer:
        return Buffer(torch.empty(size, dtype=torch.uint8))

"""What each phase of a run holds in memory at its peak, measured, and how memory is let go once it ran out.

On CUDA a peak is what the allocator reserved plus what the process holds outside it (CUDA's context, paged
optimizer state), since that is what the card has to have; on a CPU it is resident memory. A phase's peak is its
own: the figures are reset where one phase ends and the next begins.
"""

from __future__ import annotations

import contextlib
import gc
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy
import torch

from qlora_tui.engine.machine import Machine, resident_bytes, sample
from qlora_tui.engine.text import one_line

_SELF = Path("/proc/self")
_NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class Told(TypedDict):
    """What the end of a phase says of memory; None where nothing was measured or predicted."""

    peak_bytes: int | None
    predicted_bytes: int | None


@dataclass(slots=True)
class Meter:
    """Peaks by phase, in bytes. `predicted` is the budget's figure by phase, told beside what was measured."""

    device: torch.device
    machine: Machine
    predicted: Mapping[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    _open: list[tuple[str, bool]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, *, fresh: bool = False) -> Iterator[None]:
        """Measure what is done inside as phase `name`; one phase may lie inside another, and then counts for itself.

        Args:
            name: as in the budget's phases.
            fresh: give the allocator's cache back first, so that what is reserved is this phase's alone. It costs some
                milliseconds, so it is for the large phases; the others count what is allocated, a lower bound.
        """
        self._note()
        if fresh and self.device.type == "cuda":
            empty_cache(self.device)
        self._reset()
        self._open.append((name, fresh))
        try:
            yield
        finally:
            self._note()
            self._open.pop()
            self._reset()

    def told(self, name: str, predicted: str = "") -> Told:
        """Return what the end of phase `name` says: its peak so far, and what was predicted for it or for phase `predicted`."""
        self._note()
        return {"peak_bytes": self.peaks.get(name), "predicted_bytes": self.predicted.get(predicted or name)}

    def _note(self) -> None:
        if self._open:
            name, fresh = self._open[-1]
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak(reserved=fresh))

    def _peak(self, *, reserved: bool) -> int:
        if self.device.type == "cuda":
            inside = torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()
            return inside + outside_bytes(self.machine)
        return _resident_peak()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # Linux alone can; elsewhere the peak is what is resident at the end
            (_SELF / "clear_refs").write_text("5")


def outside_bytes(machine: Machine) -> int:
    """Return what this process holds on the card outside torch's allocator: the context, libraries, paged tensors.

    The driver is asked for our share; where it does not know us, as in a container, what others held when `machine`
    was looked at is taken off the whole.
    """
    ours = sample().memory_ours_bytes
    if ours is None:
        free, total = torch.cuda.mem_get_info()
        ours = total - free - machine.others_bytes
    return max(ours - torch.cuda.memory_reserved(), 0)


def empty_cache(device: torch.device) -> None:
    """Give back what the allocator keeps and does not use; dropped graphs can hold each other, so they are collected first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that the device ran out of memory, by whatever library it was said."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM))


def said(error: BaseException) -> str:
    """Return an out-of-memory error in one line, without the advice to programmers that torch appends."""
    return one_line(str(error).split("\n")[0].split(" GPU ")[0].rstrip(". "), limit=200)


def in_use(device: torch.device) -> dict[str, int]:
    """Return what a step tells of memory: allocated, reserved and their peak; on a CPU all three are resident memory."""
    if device.type == "cuda":
        told = torch.cuda.memory.memory_stats_as_nested_dict()  # once: each of torch's own functions asks for all of it and sorts it
        allocated, reserved = told["allocated_bytes"]["all"], told["reserved_bytes"]["all"]
        return {
            "memory_allocated_bytes": allocated["current"],
            "memory_reserved_bytes": reserved["current"],
            "memory_peak_bytes": allocated["peak"],
        }
    resident = resident_bytes()
    return {"memory_allocated_bytes": resident, "memory_reserved_bytes": resident, "memory_peak_bytes": resident}


@dataclass(frozen=True, slots=True)
class RandomState:
    """Every generator that training or a library beside it draws from, as it was when this was made."""

    python: Any
    numpy: Any
    torch: list[torch.Tensor]

    @staticmethod
    def now() -> RandomState:
        """Remember the generators."""
        return RandomState(random.getstate(), numpy.random.get_state(), torch_generators())

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self.python)
        numpy.random.set_state(self.numpy)
        set_torch_generators(self.torch)


def torch_generators() -> list[torch.Tensor]:
    """Return where torch's generators stand, the processor's first: the ones that training draws from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def set_torch_generators(states: list[torch.Tensor]) -> None:
    """Put torch's generators where `torch_generators` said they stood."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def _resident_peak() -> int:
    """Return the most memory that was resident since the last reset; what is resident now where the system keeps no peak."""
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", (_SELF / "status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024  # type: ignore[index]  # None is the TypeError above
    return resident_bytes()

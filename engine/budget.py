"""How many bytes a run needs, item by item, before anything is loaded.

Every figure is a formula over the model's shape and the run's settings, and says so in words. It is an
estimate: tensors are counted exactly, what kernels, the allocator and CUDA hold beside them is not, and the
margin says how much. What this device measured in earlier runs corrects it. tests/gpu compares it with
measured peaks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_tui.engine.forecast import Before
from qlora_tui.engine.machine import Machine, limited
from qlora_tui.engine.measured import Correction
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.moments import COUNTED, Item, Moments, corrected, total
from qlora_tui.engine.spec import RunConfig

__all__ = ["Budget", "Item", "PhaseBytes", "estimate"]

SPARE_HOST_BYTES = 2 << 30
"""Of RAM that pinned memory leaves to others: what is pinned can never be swapped out."""

_EXACT_SHARE = 0.01  # of what is counted from shapes: the rounding of the allocator
_REST_SHARES: Mapping[str, float] = {"cuda": 0.05, "cpu": 0.25}  # of the rest: kernels, cached blocks, the context of another card


class _Advice(Protocol):
    """A change that can be told: `fixes.Fix`, which lies above this room."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """What one phase of a run needs at its peak; `items` add up to it."""

    name: str
    bytes: int
    items: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """The estimate. `items` are those of the biggest phase and add up to `total_bytes`.

    `runs_compared`: how many measured runs of this device it was corrected by; 0 is arithmetic alone. `host_bytes` of pinned
    RAM are needed besides, where inputs of layers wait there.
    """

    items: tuple[Item, ...]
    phases: tuple[PhaseBytes, ...]
    total_bytes: int
    margin_bytes: int
    machine: Machine
    runs_compared: int = 0
    host_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the estimate is within what the device has free."""
        return self.total_bytes <= self.machine.free_bytes

    @property
    def tight(self) -> bool:
        """Whether it fits, but only if the estimate is not too low by its margin."""
        return self.fits and self.total_bytes + self.margin_bytes > self.machine.free_bytes

    @property
    def fits_host(self) -> bool:
        """Whether the machine's RAM, as far as it is known, has room for what is pinned, and some to spare."""
        free = self.machine.host_free_bytes
        return free is None or not self.host_bytes or self.host_bytes + SPARE_HOST_BYTES <= free

    def bytes_of(self, *names: str) -> int:
        """Return the size of the items called `names` together."""
        return sum(item.bytes for item in self.items if item.name in names)

    def to_json(self, *, fixes: Sequence[_Advice] = (), time: Before | None = None) -> dict[str, Any]:
        """Return the document that `budget --json` prints and `planned` carries."""
        return {
            "fits": self.fits,
            "tight": self.tight,
            "estimate": True,
            "total_bytes": self.total_bytes,
            "margin_bytes": self.margin_bytes,
            "free_bytes": self.machine.free_bytes,
            "host_bytes": self.host_bytes,
            "runs_compared": self.runs_compared,
            "device": {
                "name": self.machine.name,
                "kind": self.machine.kind,
                "total_bytes": self.machine.total_bytes,
                "others_bytes": self.machine.others_bytes,
                "others": [{"name": name, "bytes": size} for name, size in self.machine.others],
                "note": self.machine.note,
            },
            "items": [{"name": item.name, "bytes": item.bytes, "how": item.how} for item in self.items],
            "phases": [_phase(phase) for phase in self.phases],
            "fixes": [fix.to_json() for fix in fixes],
            "time": time.to_json() if time else {"step_seconds": None, "total_seconds": None},
        }


def estimate(
    model: ModelSpec, run: RunConfig, machine: Machine, *, longest: int | None = None, correction: Correction | None = None
) -> Budget:
    """Say how much memory `run` needs on `machine`, whose `memory_limit_gib` is applied here.

    What the run leaves open counts as one row at once, all layers recomputed and a 4-bit base: the least it can need
    without inputs of layers in RAM, which count only where the run says so.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device; never looked at here, so a card one does not own can be asked about.
        longest: tokens of the longest row, where the data are known; else rows are taken to be `max_length` long.
        correction: how measured peaks compared with predicted ones on this device. Without it the result is what the
            formulas say, which is what a measurement is to be held against.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    return _estimate(model, run, machine, longest, correction)


@functools.lru_cache(maxsize=2048)
def _estimate(model: ModelSpec, run: RunConfig, machine: Machine, longest: int | None, correction: Correction | None) -> Budget:
    """Estimate, once for the same question: a screen and its advice ask many times."""
    device = limited(machine, run)
    parts = Moments(model, run, device, longest)
    moments = {"load": [parts.loading()], "train": parts.training(), "eval": parts.evaluating(), "save": [parts.saving()]}
    peaks = {name: max(choices, key=total) for name, choices in moments.items()}
    if correction is not None:
        peaks = {name: corrected(items, correction.bias) for name, items in peaks.items()}
    phases = tuple(PhaseBytes(name, total(items), items) for name, items in peaks.items())
    items = max(peaks.values(), key=total)
    counted = sum(item.bytes for item in items if item.name in COUNTED)
    margin = _EXACT_SHARE * counted + _REST_SHARES[device.kind] * (total(items) - counted)
    if correction is not None:
        margin = correction.error * total(items)
    return Budget(items, phases, total(items), int(margin), device, correction.runs if correction else 0, parts.host_bytes)


def _phase(phase: PhaseBytes) -> dict[str, Any]:
    return {"name": phase.name, "bytes": phase.bytes, "items": {item.name: item.bytes for item in phase.items if item.bytes}}

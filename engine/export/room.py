"""Where and in which type an export is proved: the card if it holds the model, else the processor; float32 if that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_tui.engine import machine
from qlora_tui.engine.errors import Problem, WontFit
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.units import gib

_MORE = 1.15  # what a loader and a row's activations take beside the weights
_SPARE_BYTES = 2**30
_SIGHT_PARAMS = 700_000_000  # of the parts that see, which transformers loads too


@dataclass(frozen=True, slots=True)
class Room:
    """A device and a type to compute in."""

    device: str
    type_name: str

    @property
    def dtype(self) -> Any:
        """The type as torch knows it."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.type_name]

    @property
    def words(self) -> str:
        """Both, for people."""
        return f"{self.type_name} on {'the GPU' if self.device == 'cuda' else 'the CPU'}"


def room_for(spec: ModelSpec) -> Room:
    """Return where `spec` is proved.

    Raises:
        WontFit: neither a card nor RAM holds it in 16 bits.
    """
    found = _on_card(spec) or _in_ram(spec, machine.ram_bytes()[1])
    if found is None:
        (problem,) = ram_problems(spec)
        raise WontFit(problem.message, hint=problem.hint)
    return found


def ram_problems(spec: ModelSpec) -> list[Problem]:
    """Return that RAM does not hold the model in 16 bits for the parity gate, if so; a run's own memory is free again by then."""
    total, _ = machine.ram_bytes()
    if _in_ram(spec, total) is not None or _on_card(spec) is not None:
        return []
    told = f"to prove an export takes about {gib(_needed(spec, 2))} of RAM, and this machine has {gib(total)}"
    return [Problem("export", told, "export it on a larger machine, or with --unchecked: then nobody has compared it with the adapter")]


def _in_ram(spec: ModelSpec, free: int) -> Room | None:
    if _needed(spec, 4) <= free:
        return Room("cpu", "float32")
    return Room("cpu", "bfloat16") if _needed(spec, 2) <= free else None


def _on_card(spec: ModelSpec) -> Room | None:
    device = machine.look()
    if device.kind != "cuda" or not device.bf16:
        return None
    if _needed(spec, 4) <= device.free_bytes:
        return Room("cuda", "float32")
    return Room("cuda", "bfloat16") if _needed(spec, 2) <= device.free_bytes else None


def _needed(spec: ModelSpec, bytes_each: int) -> int:
    params = spec.params + (_SIGHT_PARAMS if spec.wrapper else 0)
    return int(params * bytes_each * _MORE) + _SPARE_BYTES

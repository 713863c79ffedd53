"""How many bytes a run needs, item by item, before anything is loaded.

Every figure is a formula over the model's shape and the run's settings, and says so in words. It is an
estimate: what is counted (weights, adapter, optimizer) is nearly exact, what depends on kernels and on the
allocator is not, and the margin says how much. tests/gpu compares it with measured peaks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_tui.engine.forecast import Before, seconds_per_token
from qlora_tui.engine.machine import Machine, find_card, limited
from qlora_tui.engine.models import ModelSpec, entries, find_entry
from qlora_tui.engine.moments import Item, Moments, total
from qlora_tui.engine.spec import RunConfig, Value
from qlora_tui.engine.units import billions, gib

__all__ = ["Budget", "Fix", "Item", "PhaseBytes", "estimate", "fixes", "tips"]


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """What one phase of a run needs at its peak."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Fix:
    """A change that saves memory: what to set, what it saves, what it costs. `enough`: it fits with this alone."""

    values: Mapping[str, Value]
    saves_bytes: int
    time_factor: float
    text: str
    enough: bool = False

    @property
    def set(self) -> str:
        """The change as the command line takes it, without `--set`."""
        return " ".join(f"{name}={_typed(value)}" for name, value in self.values.items())

    @property
    def options(self) -> str:
        """The change as options of the command line: each key needs a `--set` of its own."""
        return " ".join(f"--set {name}={_typed(value)}" for name, value in self.values.items())

    def to_json(self) -> dict[str, Any]:
        """Return the promised keys of a fix."""
        return {
            "set": self.set,
            "saves_bytes": self.saves_bytes,
            "time_factor": round(self.time_factor, 2),
            "text": self.text,
            "enough": self.enough,
        }


@dataclass(frozen=True, slots=True)
class Budget:
    """The estimate. `items` are those of the biggest phase and add up to `total_bytes`."""

    items: tuple[Item, ...]
    phases: tuple[PhaseBytes, ...]
    total_bytes: int
    margin_bytes: int
    machine: Machine

    @property
    def fits(self) -> bool:
        """Whether the estimate is within what the device has free."""
        return self.total_bytes <= self.machine.free_bytes

    @property
    def tight(self) -> bool:
        """Whether it fits, but only if the estimate is not too low by its margin."""
        return self.fits and self.total_bytes + self.margin_bytes > self.machine.free_bytes

    def bytes_of(self, *names: str) -> int:
        """Return the size of the items called `names` together."""
        return sum(item.bytes for item in self.items if item.name in names)

    def to_json(self, *, fixes: Sequence[Fix] = (), time: Before | None = None) -> dict[str, Any]:
        """Return the document that `budget --json` prints and `planned` carries."""
        return {
            "fits": self.fits,
            "tight": self.tight,
            "estimate": True,
            "total_bytes": self.total_bytes,
            "margin_bytes": self.margin_bytes,
            "free_bytes": self.machine.free_bytes,
            "device": {
                "name": self.machine.name,
                "kind": self.machine.kind,
                "total_bytes": self.machine.total_bytes,
                "others_bytes": self.machine.others_bytes,
            },
            "items": [{"name": item.name, "bytes": item.bytes, "how": item.how} for item in self.items],
            "phases": [{"name": phase.name, "bytes": phase.bytes} for phase in self.phases],
            "fixes": [fix.to_json() for fix in fixes],
            "time": time.to_json() if time else {"step_seconds": None, "total_seconds": None},
        }


def estimate(model: ModelSpec, run: RunConfig, machine: Machine, *, longest: int | None = None) -> Budget:
    """Say how much memory `run` needs on `machine`, whose `memory_limit_gib` is applied here.

    Args:
        model: the base's shape.
        run: the settings.
        machine: the device; never looked at here, so a card one does not own can be asked about.
        longest: tokens of the longest row, where the data are known; else rows are taken to be `max_length` long.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    device = limited(machine, run)
    parts = Moments(model, run, device, longest)
    moments = {
        "load": [parts.loading()],
        "train": [parts.at_loss(), parts.at_backward()],
        "eval": [parts.evaluating()],
        "save": [parts.saving()],
    }
    peaks = {name: max(choices, key=total) for name, choices in moments.items()}
    phases = tuple(PhaseBytes(name, total(items)) for name, items in peaks.items())
    items = max(peaks.values(), key=total)
    counted = sum(item.bytes for item in items if item.name in ("weights", "adapter", "gradients", "optimizer"))
    margin = int(0.02 * counted + 0.15 * (total(items) - counted))
    return Budget(items, phases, total(items), margin, device)


def fixes(model: ModelSpec, run: RunConfig, machine: Machine, *, longest: int | None = None) -> list[Fix]:
    """Return changes that save memory, cheapest first: those that leave the result alone, then by time.

    When no single one is enough, combinations follow, and then a smaller model of the same kind.
    """
    now = estimate(model, run, machine, longest=longest)
    harmless = [fix for change in _harmless(model, run, machine) if (fix := _weigh(now, model, run, change, longest)) is not None]
    others = [fix for change in _other_changes(run, now.machine, longest) if (fix := _weigh(now, model, run, change, longest)) is not None]
    ranked = sorted(harmless, key=lambda fix: (fix.time_factor, -fix.saves_bytes)) + others
    if not now.fits and not any(fix.enough for fix in ranked):
        ranked += _stronger(now, model, run, [harmless, ranked], longest)
    return ranked


def tips(model: ModelSpec, run: RunConfig, machine: Machine, *, longest: int | None = None) -> list[Fix]:
    """Return changes that make the run faster and still fit with the margin, fastest first; they cost memory."""
    now = estimate(model, run, machine, longest=longest)
    changes: list[_Change] = []
    if run.gradient_checkpointing:
        changes.append(({"gradient_checkpointing": False}, "keep all activations"))
    if run.gradient_accumulation_steps % 2 == 0 and now.machine.kind == "cuda":
        changes.append((_batch(run, 2), "twice the rows at once, as many rows a step"))
    found = []
    for change in changes:
        after = estimate(model, dataclasses.replace(run, **change[0]), machine, longest=longest)  # type: ignore[arg-type]  # table keys
        factor = _time_factor(model, run, change[0], now.machine)
        if after.fits and not after.tight and factor < 0.97:
            text = f"{change[1]}: {1 / factor:.1f}x faster, {gib(after.total_bytes)}"
            found.append(Fix(change[0], now.total_bytes - after.total_bytes, factor, text, True))
    return sorted(found, key=lambda fix: fix.time_factor)


_Change = tuple[dict[str, Value], str]


def _harmless(model: ModelSpec, run: RunConfig, machine: Machine) -> list[_Change]:
    """Changes after which the same rows give the same steps, up to rounding."""
    changes: list[_Change] = []
    if run.optim == "adamw_torch" and machine.kind == "cuda":
        changes.append(({"optim": "paged_adamw_8bit"}, "keep the optimizer's state in 8 bits"))
    if run.method == "qlora" and not run.bnb_4bit_use_double_quant:
        changes.append(({"bnb_4bit_use_double_quant": True}, "quantize the block constants too"))
    if run.attn_implementation == "eager" and model.sdpa:
        changes.append(({"attn_implementation": "sdpa"}, "attention that does not hold all scores"))
    if not run.gradient_checkpointing:
        changes.append(({"gradient_checkpointing": True}, "recompute activations instead of keeping them"))
    if run.per_device_train_batch_size > 1:
        changes.append((_batch(run, 0.5), "fewer rows at once, as many rows a step"))
    return changes


def _other_changes(run: RunConfig, machine: Machine, longest: int | None) -> list[_Change]:
    """Changes after which something else is learned, the mildest first."""
    changes: list[_Change] = []
    if run.method == "lora":
        changes.append(({"method": "qlora", "bnb_4bit_quant_type": "nf4"}, "4-bit base: a quarter of the weights' memory, a little worse"))
    if run.lora_r > 8:
        changes.append(({"lora_r": run.lora_r // 2}, "half the rank: learns less detail"))
    if run.dtype == "float32" and machine.bf16:
        changes.append(({"dtype": "bfloat16"}, "compute in 16 bits, as is usual"))
    length = min(run.max_length, longest or run.max_length)
    if length > 256:
        changes.append(({"max_length": max(256, length // 2)}, "half the length: longer rows are dropped"))
    return changes


def _stronger(now: Budget, model: ModelSpec, run: RunConfig, groups: list[list[Fix]], longest: int | None) -> list[Fix]:
    """Several changes at once, the harmless ones first, if that is enough; and the largest sister model that then fits."""
    bundles = [{name: value for fix in group for name, value in fix.values.items()} for group in groups]
    found: list[Fix] = []
    for bundle, words in zip(bundles, ("all of these that leave the result alone", "all of these together"), strict=True):
        fix = _weigh(now, model, run, (bundle, words), longest)
        if fix is not None and fix.enough and not found:
            found.append(fix)
    leaner = dataclasses.replace(run, **bundles[0])  # type: ignore[arg-type]  # table keys
    for sister in _sisters(model):
        after = estimate(sister, leaner, now.machine, longest=longest)
        if after.fits:
            factor = sister.params / model.params * _time_factor(model, run, bundles[0], now.machine)
            text = f"a smaller model, {billions(sister.params)} weights: {gib(after.total_bytes)}"
            values = {"model_name_or_path": sister.name, **bundles[0]}
            return [*found, Fix(values, now.total_bytes - after.total_bytes, factor, text, True)]
    return found


def _sisters(model: ModelSpec) -> list[ModelSpec]:
    """Return smaller models of the same maker and family that need no other licence click, the largest first."""
    known = find_entry(model.name)
    if known is None:
        return []
    maker = model.name.split("/")[0]
    near = [entry.spec for entry in entries() if entry.spec.name.split("/")[0] == maker and (known.gated or not entry.gated)]
    smaller = [spec for spec in near if spec.family == model.family and spec.params < model.params]
    return sorted(smaller, key=lambda spec: -spec.params)


def _batch(run: RunConfig, factor: float) -> dict[str, Value]:
    rows = run.per_device_train_batch_size * run.gradient_accumulation_steps
    size = max(1, int(run.per_device_train_batch_size * factor))
    while rows % size:
        size -= 1
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}


def _weigh(now: Budget, model: ModelSpec, run: RunConfig, change: _Change, longest: int | None) -> Fix | None:
    values, text = change
    after = estimate(model, dataclasses.replace(run, **values), now.machine, longest=longest)  # type: ignore[arg-type]  # table keys
    saved = now.total_bytes - after.total_bytes
    if saved <= 0:
        return None
    factor = _time_factor(model, run, values, now.machine)
    cost = f", {factor:.1f}x the time" if factor > 1.05 else ""
    return Fix(values, saved, factor, f"{text}: saves {gib(saved)}{cost}", after.fits)


def _time_factor(model: ModelSpec, run: RunConfig, values: dict[str, Value], machine: Machine) -> float:
    """Return how much longer a token takes after a change; a card that is not in the table is taken for a common one."""
    known = machine if seconds_per_token(model, run, machine) is not None else find_card("RTX 4090")
    old = seconds_per_token(model, run, known)
    new = seconds_per_token(model, dataclasses.replace(run, **values), known)  # type: ignore[arg-type]  # table keys
    return new / old if old and new else 1.0


def _typed(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else f"{value}"

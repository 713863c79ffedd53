"""What each field of the numbers page does to memory, time and quality: measured by the budget where it can be."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qlora_tui.engine.changes import Asked
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig, rows_at_once, rows_per_step, values_of
from qlora_tui.engine.unusual import Known
from qlora_tui.engine.values import Value
from qlora_tui.tui import words
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import TOO_LONG, Lengths, share
from qlora_tui.tui.screens.desk import Outlook
from qlora_tui.tui.screens.settings import Setting

_SAME_BYTES = 1 << 20
_SAME_TIME = 0.005
_MEASURED = frozenset(
    {
        "lora_r",
        "max_length",
        "per_device_train_batch_size",
        "gradient_checkpointing",
        "method",
        "lora_target_modules",
        "use_dora",
        "optim",
        "bnb_4bit_use_double_quant",
    }
)
"""Keys that can change memory or the time of a row; what others do is known without asking."""


@dataclass(frozen=True)  # no slots: what is worked out once is kept
class Scene:
    """Everything that the words beside the fields rest on: the run, what it would need, and its rows."""

    run: RunConfig
    outlook: Outlook | None = None
    look: DataLook | None = None
    spec: ModelSpec | None = None
    machine: Machine | None = None

    @property
    def lengths(self) -> Lengths:
        """Return the lengths of the rows; none where no data have been read."""
        return self.look.lengths if self.look else Lengths()

    @property
    def known(self) -> Known:
        """Return what is known of the run beside its settings."""
        rows, steps = (self.outlook.rows, self.outlook.steps) if self.outlook else (0, 0)
        positions = self.spec.max_position_embeddings if self.spec else 0
        return Known(rows, steps, self.lengths.over(self.run.max_length), positions)

    @functools.cached_property
    def asked(self) -> Asked | None:
        """Return the planned run as a question to the budget, so that a change is weighed with all else as planned."""
        if self.outlook is None or self.spec is None or self.machine is None:
            return None
        lengths = self.lengths
        longest = lengths.fitted(self.run).longest_trained(self.run.max_length)
        try:
            return Asked(self.spec, self.outlook.plan.run, self.machine, longest, lengths.tokens, None)
        except EngineError:
            return None


def note_of(setting: Setting, scene: Scene) -> str:
    """Return the half-sentence beside a field; some say what the budget measured, or what happens to the rows."""
    run, lengths, planned = scene.run, scene.lengths, scene.outlook.plan.run if scene.outlook else scene.run
    match setting.name:
        case "max_length" if lengths.tokens:
            over, about = lengths.over(run.max_length), "" if lengths.measured else "about "
            if not over:
                return f"tokens; your longest row has {about}{lengths.longest:,}"
            return f"{about}{share(over)} of your rows are longer: {TOO_LONG[run.too_long]}"
        case "lora_r" if (doubled := _bytes_of(scene, {"lora_r": run.lora_r * 2})) is not None:
            return f"learns more; {_signed(doubled)} a doubling"
        case "per_device_train_batch_size" if not run.per_device_train_batch_size and scene.outlook:
            return f"takes {rows_at_once(planned)}: {'the fastest that fits' if scene.outlook.budget.fits else 'the least there is'}"
        case "gradient_accumulation_steps":
            return f"{rows_per_step(run):,} rows a step; costs no memory"
        case "gradient_checkpointing" if run.gradient_checkpointing == "auto" and scene.spec and scene.outlook:
            return _recomputed(planned, scene.spec.num_hidden_layers)
        case "num_train_epochs" if run.max_steps:
            return f"{run.max_steps:,} steps at most"
        case "method" if scene.outlook:
            return f"weights take {words.size(scene.outlook.budget.bytes_of('weights', 'embeddings'))}"
    return setting.note


def effect_of(setting: Setting, scene: Scene) -> str:
    """Return what the next value would do to memory and time, such as `32: +167 MiB, 1.02x the time`; empty where nobody knows.

    All else is held as planned: the planner might spend the difference elsewhere, and that would say nothing of the field.
    """
    run = scene.run
    after = setting.stepped(run, 1)
    if after == run:
        after = setting.stepped(run, -1)
    if after == run:
        return ""
    shown = setting.shown(after)
    if setting.name == "num_train_epochs" and run.num_train_epochs and not run.max_steps:
        return f"{shown}: {after.num_train_epochs / run.num_train_epochs:.3g}x the time, no memory."
    if setting.name not in _MEASURED:
        return ""
    old, new = values_of(run), values_of(after)
    found = _question(scene, {name: value for name, value in new.items() if old[name] != value})
    if found is None:
        return ""
    asked, values = found
    try:
        more, factor = asked.after(values).total_bytes - asked.now.total_bytes, asked.factor(values)
    except EngineError:
        return ""
    memory = _signed(more) if abs(more) >= _SAME_BYTES else "the same memory"
    time = f"{factor:.2f}x the time" if abs(factor - 1) >= _SAME_TIME else "the same time"
    return f"{shown}: {memory}, {time}."


def _question(scene: Scene, values: dict[str, Value]) -> tuple[Asked, dict[str, Value]] | None:
    """Return the planned run and a change to be weighed against it; None where that cannot be.

    A value that leaves the choice to the planner is no change that could be weighed.
    """
    asked = scene.asked
    if asked is None or values.get("per_device_train_batch_size") == 0 or "auto" in values.values():
        return None
    planned = values_of(asked.run)
    if rows := values.get("per_device_train_batch_size"):  # told with the same rows a step, which is what one would do
        values = {**values, "gradient_accumulation_steps": max(1, rows_per_step(asked.run) // int(str(rows)))}
    return None if all(planned[name] == value for name, value in values.items()) else (asked, values)


def _bytes_of(scene: Scene, values: dict[str, Value]) -> int | None:
    """Return the bytes that a change adds; None where that cannot be said."""
    found = _question(scene, values)
    try:
        return found[0].after(values).total_bytes - found[0].now.total_bytes if found else None
    except EngineError:
        return None


def _recomputed(planned: RunConfig, layers: int) -> str:
    kept = {"true": 0, "false": layers}.get(planned.gradient_checkpointing)
    kept = layers - int(planned.gradient_checkpointing) if kept is None and planned.gradient_checkpointing.isdecimal() else kept
    if kept is None:
        return "less memory, about a third slower"
    return "takes none: all activations fit" if kept == layers else f"takes {layers - kept} of {layers} layers"


def _signed(amount: int) -> str:
    return f"{'+' if amount >= 0 else '-'}{words.size(abs(amount))}"

"""What values of a run go together: every problem that needs no disk, model or device to see.

A problem names its key, says what is wrong and what to write instead, so that a command line refuses it before
anything is loaded and a screen can show it beside the field.
"""

from __future__ import annotations

import math

from qlora_tui.engine import columns, hooks, rates, until
from qlora_tui.engine.errors import Problem
from qlora_tui.engine.spec import KEYS, WATCHED, RunConfig, nearest
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import words
from qlora_tui.engine.values import Key, Value

SHORTEST_HANG_SECONDS = 60.0
"""A run may be silent for so long without being ill."""


def problems(run: RunConfig) -> list[Problem]:
    """Return everything wrong with `run` that needs no disk, model or device to see."""
    found = bounds(run)
    if not run.model_name_or_path:
        found.append(Problem("model_name_or_path", "no model named", "say --model DIR_OR_HUB_ID or --preset NAME"))
    if not run.data:
        found.append(Problem("data", "no data named", "say --data FILE.jsonl"))
    if not all(run.data):
        found.append(Problem("data", "one of the names is empty", "say --data FILE.jsonl"))
    if sentence := columns.fault(run.data_columns):
        found.append(Problem("data_columns", sentence, "say --set data_columns=prompt=question"))
    found += [fault] if run.data and (fault := weights_fault(run)) else []
    found += [Problem(name, "it is empty", f"leave it out for {default}") for name, default in _never_empty(run)]
    if not run.num_train_epochs and not run.max_steps:
        found.append(Problem("num_train_epochs", "0 epochs and no max_steps: nothing would be trained", "set one of them"))
    if run.learning_rate == 0:
        found.append(Problem("learning_rate", "0 would change nothing", "2e-4 is usual for LoRA"))
    if run.val_set_size >= 1 and run.val_set_size != int(run.val_set_size):
        found.append(Problem("val_set_size", f"{run.val_set_size:g} is neither a share nor a number of rows", "say 0.1 or 50"))
    if run.warmup_steps >= 1 and run.max_steps and run.warmup_steps > run.max_steps:
        found.append(
            Problem("warmup_steps", f"{run.warmup_steps:g} is more than max_steps {run.max_steps}", "a share such as 0.05 always fits")
        )
    if not all(run.lora_target_modules) or not run.lora_target_modules:
        found.append(Problem("lora_target_modules", "no layer named", "all-linear is the usual choice"))
    return [
        *found,
        *_limits(run),
        *_rate_changes(run),
        *_without_effect(run),
        *_combinations(run),
        *_detectors(run),
        *hooks.faults(run.notify),
    ]


def _limits(run: RunConfig) -> list[Problem]:
    """Return times that are none, or that would end a run which is well."""
    found = []
    if run.until and (sentence := _not_a_time(run.until)):
        found.append(Problem("until", sentence, "say 07:00, or 2026-11-28 07:00"))
    if 0 < run.end_if_hung < SHORTEST_HANG_SECONDS:
        told = f"{words(run.end_if_hung)} is less than a long step can take"
        found.append(Problem("end_if_hung", told, f"say at least {words(SHORTEST_HANG_SECONDS)}, or 0"))
    return found


def _rate_changes(run: RunConfig) -> list[Problem]:
    """Return changes of the learning rate that are none, that no step would meet, or that lead too far."""
    try:
        changes = rates.planned(run.learning_rate_changes)
    except ValueError as error:
        told = f"{one_line(error, limit=60)!r} is no change of the learning rate"
        return [Problem("learning_rate_changes", told, f"say STEP:FACTOR, such as 121:0.5, with {rates.LOWEST:g} to {rates.HIGHEST:g}")]
    late = next((change for change in changes if 0 < run.max_steps < change.step), None)
    if late is not None:
        return [Problem("learning_rate_changes", f"{late.text} comes after the last step, {run.max_steps}", "leave it out")]
    made = rates.Rates()
    for change in sorted(changes, key=lambda change: change.step):
        if fault := made.fault(change.factor):
            return [Problem("learning_rate_changes", f"at {change.text} {fault}", "leave it out, or plan another learning_rate")]
        made.change(change)
    return []


def _not_a_time(text: str) -> str:
    try:
        until.read(text)
    except ValueError:
        return f"{text!r} is no time of day"
    return ""


def weights_fault(run: RunConfig) -> Problem | None:
    """Return what is wrong with `data_weights`: not one for each source of data, or one that is no share; None if nothing is."""
    if not run.data_weights:
        return None
    if len(run.data_weights) != len(run.data):
        told = f"{len(run.data_weights)} weights for {len(run.data)} sources of data"
        return Problem("data_weights", told, "give each source one, in their order")
    wrong = next((text for text in run.data_weights if not _is_share(text)), None)
    return None if wrong is None else Problem("data_weights", f"{wrong!r} is no share", "a share is a number above 0, such as 0.7 or 2")


def _is_share(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        return False


def _without_effect(run: RunConfig) -> list[Problem]:
    """Return filters that could never leave a row out."""
    if 0 < run.perplexity_filter <= 1:
        return [Problem("perplexity_filter", f"no perplexity is under {run.perplexity_filter:g}", "3 is usual, 0 turns it off")]
    if run.perplexity_filter and not run.perplexity_drop_most:
        return [
            Problem("perplexity_drop_most", "with 0 no row could be left out", "0.2 is usual; perplexity_filter=0 turns the filter off")
        ]
    return []


def _combinations(run: RunConfig) -> list[Problem]:
    """Return kinds of adapter that do not go together, whatever the model."""
    found = []
    if run.init_lora_weights == "pissa" and run.method in ("qlora", "lora-8bit"):
        told = "pissa starts from the main directions of 16-bit weights, which a base in fewer bits no longer holds"
        found.append(Problem("init_lora_weights", told, "say method=lora, or init_lora_weights=default"))
    if run.init_lora_weights == "pissa" and run.use_dora:
        told = "DoRA and pissa both take the base's weights apart, each in its own way"
        found.append(Problem("use_dora", told, "turn one of them off"))
    if run.use_dora and run.lora_dropout:
        told = "with DoRA the base's part would have to be computed twice, with and without dropout"
        found.append(Problem("lora_dropout", told, "say lora_dropout=0, or use_dora=false"))
    if run.cuda_graphs == "on" and run.lora_dropout:
        told = f"a recorded batch draws no random numbers, and lora_dropout is {run.lora_dropout:g}"
        found.append(Problem("cuda_graphs", told, "say cuda_graphs=auto, or lora_dropout=0"))
    if run.offload_checkpoints == "on" and run.gradient_checkpointing == "false":
        told = "inputs of recomputed layers wait in RAM, and no layer is recomputed"
        found.append(Problem("offload_checkpoints", told, "say gradient_checkpointing=true, or offload_checkpoints=auto"))
    if run.packing == "on" and (told := _unfused(run)):
        found.append(Problem("packing", f"rows lie end to end for fused layers only, and {told}", "say packing=auto, or off"))
    return found


def _unfused(run: RunConfig) -> str:
    """Return the setting that keeps layers from being fused, whatever the model."""
    kept = {
        "fused_layers is off": run.fused_layers == "off",
        "DoRA goes without them": run.use_dora,
        "lora_dropout goes without them": run.lora_dropout > 0,
        "attn_implementation=eager goes without them": run.attn_implementation == "eager",
    }
    return next((told for told, so in kept.items() if so), "")


def _detectors(run: RunConfig) -> list[Problem]:
    """Return the names that no detector has."""
    asked = {"watch_stop": run.watch_stop, "watch_rollback": run.watch_rollback}
    unknown = [(key, name) for key, names in asked.items() for name in names if name not in WATCHED]
    known = f"there are {', '.join(WATCHED)}"
    return [Problem(key, f"no detector is called {name!r}", nearest(name, WATCHED) or known) for key, name in unknown]


def _never_empty(run: RunConfig) -> list[tuple[str, Value]]:
    """Return the keys that are empty and must not be, with their defaults: an empty folder name would mean this very folder."""
    return [(name, KEYS[name].default) for name, text in (("revision", run.revision), ("runs_dir", run.runs_dir)) if not text]


def bounds(run: RunConfig) -> list[Problem]:
    """Return the values of `run` that no run could have, whatever the model and the data."""
    return [problem for key in KEYS.values() if (problem := _out_of_bounds(run, key))]


def _out_of_bounds(run: RunConfig, key: Key) -> Problem | None:
    value = getattr(run, key.name)  # the table is made from the fields, so no name is guessed
    if key.choices and value not in key.choices:
        return Problem(key.name, f"{value!r} is not one of {', '.join(key.choices)}", nearest(str(value), key.choices))
    if key.kind in ("integer", "number", "duration") and not key.low <= value <= key.high:
        side, limit = ("least", key.low) if value < key.low else ("most", key.high)
        told, bound = (f"{value}", f"{limit:.0f}") if key.kind == "integer" else (f"{value:g}", f"{limit:g}")
        return Problem(key.name, f"{told} is out of range", f"it must be at {side} {bound}")
    return None

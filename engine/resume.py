"""What a resume may change, what each change does, and what it must find as it was.

The settings that count are those in the checkpoint, not the ones in `run.toml`, which a person may have edited since.
No torch here: a command line refuses a resume before it loads one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from qlora_tui.engine import shelf
from qlora_tui.engine.errors import ConfigError, ConfigErrors, Problem
from qlora_tui.engine.events import Command, Record
from qlora_tui.engine.rates import Change
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, from_values, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.values import Value, read_value

_ENDS_BYTES = 2**20
_LONGER = "the run ends there, and the learning rate goes on as in a run of that length"
ON_RESUME: Mapping[str, str] = {
    "max_steps": _LONGER,
    "num_train_epochs": _LONGER,
    "max_time": "counted anew from this resume; the schedule stays",
    "until": "the run ends by then; the schedule stays",
    "max_temperature": "watched from now on",
    "end_if_hung": "watched from now on",
    "eval_steps": "measured at those steps from now on; the schedule stays",
    "save_steps": "saved at those steps from now on; the schedule stays",
    "sample_prompts": "shown from now on; the adapter is the same with them or without",
    "final_checks": "measured at the end or not; the adapter is the same",
    "save_total_limit": "older checkpoints beyond it go at the next save; the schedule stays",
    "watch_stop": "obeyed from now on; the schedule stays",
    "watch_rollback": "obeyed from now on; the schedule stays",
    "notify": "told at the end of this attempt",
    "report_to": "followed from now on",
    "export_to": "made at the end; the adapter is the same with them or without",
    "export_type": "of exports made at the end",
    "revision": "only a name: the weights must be those of the run's first part",
}
"""The keys that a resume may change, with the effect of each; every other one would make it another run."""
_PLACE = ("runs_dir",)
"""Where a run lies is no part of what is trained."""


def resumable(saved: RunConfig, asked: Mapping[str, Value]) -> tuple[RunConfig, list[str]]:
    """Return the config of a resume and, in sentences, what each change does.

    Raises:
        ConfigErrors: a change that would make it another run; every one of them is named.
    """
    before = values_of(saved)
    changes = {name: value for name, value in asked.items() if value != before[name]}
    refuse([name for name in changes if name not in (*ON_RESUME, *_PLACE)], before)
    run = from_values({**before, **changes})
    if found := problems(run):
        raise ConfigErrors(found)
    told = {name: value for name, value in changes.items() if name in ON_RESUME}
    return run, [f"{name}: {_told(before[name])} -> {_told(value)}; {ON_RESUME[name]}" for name, value in told.items()]


def refuse(names: list[str], before: Mapping[str, Value]) -> None:
    """Refuse a resume that changes the settings called `names`.

    Raises:
        ConfigErrors: there are some; each is named with what it was.
    """
    if names:
        may = ", ".join(name for name in ON_RESUME if name in KEYS)
        hint = f"leave it out, or start a new run; a resume may change {may}"
        raise ConfigErrors([Problem(name, f"it was {_told(before[name])} when the run began", hint) for name in names])


def trained_with(folder: Path) -> RunConfig | None:
    """Return the settings of the checkpoint that a resume of `folder` would go on from, or None if there is none.

    Raises:
        CheckpointError: there are checkpoints, and none of them is sound.
    """
    path = shelf.newest_sound(folder)
    return None if path is None else from_values(readable(shelf.saved_config(path)))


def readable(config: Mapping[str, Any]) -> dict[str, Value]:
    """Return what this version understands of settings that another may have written."""
    found: dict[str, Value] = {}
    for name, value in config.items():
        with contextlib.suppress(KeyError, ConfigError):
            found[name] = read_value(KEYS[name], value)
    return found


def base_print(folder: Path) -> str:
    """Return a digest of the base's weights: names, sizes, and the first and last MiB of each file.

    Reading all of an 8 B model would cost half a minute of disk; another model, commit or conversion differs here.
    """
    digest = blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_ENDS_BYTES))
            handle.seek(max(0, size - _ENDS_BYTES))
            digest.update(handle.read(_ENDS_BYTES))
    return digest.hexdigest()


def rate_changes(records: Iterable[Record]) -> list[Change]:
    """Return the changes of the learning rate that people made to a run, in their order, each once.

    A resume makes those again that came after its checkpoint, at the same steps; and a new run that is told of all of them
    (`learning_rate_changes`) goes the same way without anybody who presses keys.
    """
    found: dict[str, Change] = {}
    for record in records:
        told = record.event
        if isinstance(told, Command) and told.name == "set" and told.obeyed and told.step is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found.setdefault(told.id, Change(told.step, float(told.args["factor"]), told.id))
    return list(found.values())


def _told(value: Value) -> str:
    return one_line(", ".join(value) if isinstance(value, tuple) else value)

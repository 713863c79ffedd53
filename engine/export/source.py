"""A run that is over, read back from its folder: its settings, its adapter and the original weights of its base."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_tui.engine import builtin, hub, models, resume, shelf
from qlora_tui.engine.errors import CheckpointError, ConfigError, JournalError, ModelError
from qlora_tui.engine.events import Evaluated, Saved
from qlora_tui.engine.export.files import ADAPTER_FILES
from qlora_tui.engine.export.target import Look, Source
from qlora_tui.engine.journal import EVENTS, is_running, read_records
from qlora_tui.engine.preset import read_file
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.spec import BUILTIN, RunConfig, from_values


def open_run(folder: Path, look: Look, progress: Callable[[int, int], object]) -> Source:
    """Read the run in `folder`, which has to be over.

    Raises:
        JournalError: it is running.
        EngineError: as `read_run`.
    """
    if is_running(folder):
        raise JournalError(f"run {folder.name} is running", hint="export it once it has ended")
    return read_run(folder, look, progress)


def read_run(folder: Path, look: Look, progress: Callable[[int, int], object]) -> Source:
    """Read the run in `folder`; what is missing of its base is fetched, as at the run's start, by the same commit.

    Raises:
        ConfigError: it has no adapter.
        ModelError: its base is not there any more, or another one is in its place.
        CheckpointError: its base's weights are not those that it was trained on.
        FetchError: the hub could not be reached.
    """
    if not all((folder / "adapter" / name).is_file() for name in ADAPTER_FILES):
        raise ConfigError(f"run {folder.name} has no adapter", hint=f"qlora-tui --resume {folder.name} finishes it", where="RUN")
    run = settings(folder)
    origin = _origin(folder)
    base, commit = _base(run, origin, look, progress)
    if origin.get("base") not in (None, resume.base_print(base)):
        told = "the base's weights are not those that the run was trained on"
        raise CheckpointError(told, where=str(base), hint="put the old ones back: merged into others, the adapter means something else")
    return Source(folder=folder, run=run, base=base, commit=commit, spec=models.from_folder(base))


def settings(folder: Path) -> RunConfig:
    """Return what the run was trained with; its `run.toml` where no checkpoint is left to say."""
    with contextlib.suppress(CheckpointError):
        if (found := resume.trained_with(folder)) is not None:
            return found
    return from_values(read_file(folder / RUN_FILE))


def trained_losses(folder: Path) -> dict[int, float]:
    """Return nats a supervised token of each held-out row, as the run measured them for the saved adapter on the base as trained.

    Nothing where that was not measured last: a run that was stopped measures no more.
    """
    step, path = 0, ""
    for record in read_records(folder / EVENTS):
        if isinstance(record.event, Evaluated):
            step, path = record.event.step, record.event.path
        elif isinstance(record.event, Saved) and record.event.kind == "adapter" and record.event.step != step:
            step, path = record.event.step, ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if path and step:
            rows = [json.loads(line) for line in (folder / path).read_text(encoding="utf-8").splitlines()]
            return {int(row["row"]): float(row["nll"]) / int(row["tokens"]) for row in rows}
    return {}


def _origin(folder: Path) -> dict[str, Any]:
    """Return what the newest sound checkpoint remembers of the base; nothing where none is left."""
    path, _ = shelf.newest(folder)
    if path is None:
        return {}
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((path / shelf.STATE).read_text(encoding="utf-8")))
    return {}


def _base(run: RunConfig, origin: dict[str, Any], look: Look, progress: Callable[[int, int], object]) -> tuple[Path, str]:
    """Return the folder of the original weights and their commit."""
    name, commit = run.model_name_or_path, str(origin.get("commit") or "")

    def stopping() -> bool:
        look()
        return False

    if name.startswith(BUILTIN):
        return builtin.fetch(progress, stopping), commit
    if not Path(name).is_dir() and (name.startswith(("/", ".", "~"))):
        raise ModelError("the folder of the run's base is gone", where=name, hint="put it back: the merged model is made from its weights")
    found = hub.weights(name, run.revision, commit, progress, stopping)
    return found, commit if not Path(name).is_dir() else ""

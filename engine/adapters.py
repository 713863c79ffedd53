"""Which adapter of a run is meant: the one that it ended with, or the one whose held-out loss was lowest. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine import resume, shelf
from qlora_tui.engine.errors import CheckpointError, ConfigError
from qlora_tui.engine.events import Saved
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.preset import read_file
from qlora_tui.engine.runs import RUN_FILE
from qlora_tui.engine.spec import RunConfig, from_values

ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Chosen:
    """An adapter of the run in `folder`: where its weights lie, after which step, and which one it is, in words."""

    folder: Path
    path: Path
    step: int
    which: str


def find(folder: Path, *, best: bool = False) -> Chosen:
    """Return the last adapter of the run in `folder`, or the best one by held-out loss.

    Raises:
        ConfigError: there is none.
        CheckpointError: the best one's checkpoint is damaged.
    """
    if best:
        return _best(folder)
    path = folder / ADAPTER
    if not (path / shelf.ADAPTER_WEIGHTS).is_file() or path.is_symlink():
        left = "; --best measures its best checkpoint" if shelf.marks(folder).best is not None else ""
        raise ConfigError(f"run {folder.name} has no adapter: it has not come to its end{left}", where="RUN")
    events = [record.event for record in read_records(folder / EVENTS)]
    step = next((event.step for event in reversed(events) if isinstance(event, Saved) and event.kind == "adapter"), 0)
    return Chosen(folder, path, step, f"the last, of step {step}")


def _best(folder: Path) -> Chosen:
    step = shelf.marks(folder).best
    if step is None or not (path := shelf.path_of(folder, step)).is_dir():
        raise ConfigError(f"run {folder.name} keeps no best checkpoint: its hold-out was never measured", where="--best")
    shelf.verify(path)
    return Chosen(folder, path, step, f"the best by held-out loss, of step {step}")


def config_of(folder: Path) -> RunConfig:
    """Return the settings that the run in `folder` was trained with: those of its checkpoints, or of its run.toml.

    Raises:
        ConfigError: neither can be read.
    """
    try:
        known = resume.trained_with(folder)
    except CheckpointError:
        known = None
    return known or from_values(read_file(folder / RUN_FILE))

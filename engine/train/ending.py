"""How a run ends: its adapter written and measured, or an adapter of another run measured again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_tui.engine import checkpoint
from qlora_tui.engine.adapters import Chosen
from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.events import Event, Saved
from qlora_tui.engine.spec import BUILTIN, RunConfig
from qlora_tui.engine.train import verdict
from qlora_tui.engine.train.holdout import poll_for

if TYPE_CHECKING:
    from qlora_tui.engine.train.loop import Loop


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended, if it did not end in an error."""

    outcome: Literal["done", "stopped", "aborted"]
    reason: str
    adapter: str = ""


def finish(run: RunConfig, loop: Loop, base: Path, ending: str) -> Generator[Event, None, Result]:
    """Write the adapter and measure it; an aborted run leaves what the last checkpoint holds. `base` is the folder of the base."""
    if ending == "abort":
        return Result("aborted", f"aborted at step {loop.step}; checkpoint of step {max(0, loop.keeper.step)} is kept")
    if loop.step == 0:
        return Result("stopped", "stopped before the first step: there is nothing to save")
    path = checkpoint.write_adapter(loop.holdout.folder, loop.loaded.model, _base_name(run, base), load_tokenizer(base, run.chat_template))
    yield Saved(loop.step, path.name, checkpoint.folder_bytes(path), "adapter")
    if ending == "stop":
        lost = "" if loop.keeper.step == loop.step else f"; without a checkpoint: a resume goes on from step {max(0, loop.keeper.step)}"
        return Result("stopped", f"stopped and saved at step {loop.step} of {loop.total}{lost}", path.name)
    yield from verdict.told((yield from loop.measure()))
    yield from loop.checks.final(loop)
    reason = f"all {loop.total} steps" if ending == "done" else f"time was up at step {loop.step} of {loop.total}"
    return Result("done", reason + _unmeasured(loop), path.name)


def _unmeasured(loop: Loop) -> str:
    """Say that somebody stopped the last measurement, and what makes up for it; the adapter is whole."""
    told = loop.holdout.told
    if loop.wishes.urgent() is None or not loop.holdout.rows or (told is not None and told.step == loop.step):
        return ""
    return f"; its last measurement was stopped: qlora-tui eval {loop.holdout.folder.name} makes up for it"


def measure_again(loop: Loop, chosen: Chosen) -> Generator[Event, None, Result]:
    """Measure the base and an adapter of another run as that run did, and its last checks if `final_checks` asks for them."""
    checkpoint.read_adapter(chosen.path, loop.loaded.model)
    loop.step = chosen.step
    loop.holdout.recall(chosen.folder)
    yield from loop.holdout.measure(0, loop.loaded, loop.fence)
    poll_for(loop.wishes)
    yield from loop.holdout.measure(loop.step, loop.loaded, loop.fence)
    poll_for(loop.wishes)
    yield from loop.checks.final(loop)
    return Result("done", f"measured {chosen.which}")


def _base_name(run: RunConfig, folder: Path) -> str:
    """Return what the adapter names as its base: the hub id, or the folder that holds the weights."""
    name = run.model_name_or_path
    return str(folder.resolve()) if name.startswith(BUILTIN) or Path(name).is_dir() else name

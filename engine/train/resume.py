"""What a run was made from, as its checkpoints remember it, and whether a resume finds it again.

An exact resume needs the same settings, the same rows in the same order and the same base. Each of them can change
behind a run's back: a data file that was edited, a branch on a hub that moved, a `run.toml` touched by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_tui.engine import checkpoint, shelf
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.events import Event, Finding, Record, Resumed
from qlora_tui.engine.resume import ON_RESUME, base_print, readable, resumable
from qlora_tui.engine.spec import RunConfig, from_values, values_of
from qlora_tui.engine.text import one_line
from qlora_tui.engine.train import verdict
from qlora_tui.engine.train.loop import Loop
from qlora_tui.engine.train.schedule import learning_rate

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def origin(run: RunConfig, rows: Iterable[TokenRow], base: Path, commit: str) -> dict[str, Any]:
    """Return what a checkpoint has to remember of `run`, its rows (trained and held out) and its base, as JSON can hold it."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    return {"config": values_of(run), "data": data_print(rows), "base": base_print(base), "commit": commit, "versions": versions}


def data_print(rows: Iterable[TokenRow]) -> str:
    """Return a digest of every token and mask of `rows`, in their order; about two seconds a million rows."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(row.row.to_bytes(8, "little"))
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(bytes(row.trained))
    return digest.hexdigest()


def resume(folder: Path, loop: Loop, records: Sequence[Record]) -> Iterator[Event]:
    """Go on from the newest checkpoint that proves sound; without any, start again and say so.

    A run that the watch stopped goes back to its last healthy one, with half the learning rate; `records` tell of it.

    Raises:
        CheckpointError: none is sound, or the run no longer finds its rows or its base.
        ConfigErrors: settings changed that would make it another run.
    """
    healthy = shelf.last_healthy(folder) if verdict.stopped_by(records) in loop.watch.acting else None
    _, damaged = shelf.newest(folder)
    path = healthy or shelf.newest_sound(folder)
    for sentence in damaged:
        yield Finding("checkpoint", "warn", 0, f"{sentence}; an older checkpoint is used", ("check the disk",))
    if path is None:
        yield Resumed(0)
        yield from verdict.resumed_after_stop(loop, records)
        return
    check(checkpoint.read_state(path), loop.origin, str(path))
    state = checkpoint.restore(path, loop.loaded.model, loop.optimizer)
    if healthy is not None:
        shelf.roll_back(folder, shelf.step_of(healthy))  # only now: what was refused above has lost nothing
    loop.restore(state)
    loop.total = _steps(state, loop.origin, loop.total)
    yield Resumed(loop.step)
    yield from verdict.resumed_after_stop(loop, records)
    yield from tell(state, loop.origin, loop.run, loop.total)


def _steps(state: Mapping[str, Any], now: Mapping[str, Any], total: int) -> int:
    """Return how many steps a resumed run has: those that `until` left it, unless the resume asks for another length."""
    saved = readable(state.get("config") or {})
    same = all(saved.get(name) == now["config"].get(name) for name in ("max_steps", "num_train_epochs"))
    return min(total, int(state["total"])) if saved.get("until") and same else total


def check(state: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Check that a resume finds what the checkpoint's run was made from.

    Raises:
        ConfigErrors: settings changed that would make it another run.
        CheckpointError: the rows or the base are not the same.
    """
    saved = readable(state.get("config") or {})
    resumable(from_values(saved), {name: value for name, value in now["config"].items() if name in saved})
    if state.get("data") != now["data"]:
        told = "the rows are not those that the run began with: its data or its tokenizer changed"
        raise CheckpointError(told, where=where, hint="put the old files back, or start a new run")
    if state.get("base") != now["base"]:
        was = str(state.get("commit") or "")
        hint = f"add --set revision={was}" if was and was != now["commit"] else "put the old weights back, or start a new run"
        raise CheckpointError("the base's weights are not those that the run began with", where=where, hint=one_line(hint))


def tell(state: Mapping[str, Any], now: Mapping[str, Any], run: RunConfig, total: int) -> Iterator[Event]:
    """Say what a resume does differently: other libraries, and a learning rate that no longer goes where it went."""
    step, before = int(state["step"]), state.get("versions") or {}
    other = [f"{name} {one_line(was)} -> {now['versions'].get(name)}" for name, was in before.items() if was != now["versions"].get(name)]
    if other:
        message = f"the checkpoint was written with other libraries ({', '.join(other)}): same rows and schedule, perhaps not the same bits"
        yield Finding("resume", "warn", step, message, ("install the old versions for an exact resume",))
    saved = readable(state.get("config") or {})
    changed = [name for name in ON_RESUME if name in saved and saved[name] != now["config"].get(name)]
    if changed:
        was = learning_rate(run, step + 1, int(state["total"])) if step < int(state["total"]) else 0.0
        rate = learning_rate(run, step + 1, total)
        message = "goes on with " + ", ".join(f"{name}={now['config'][name]}" for name in changed)
        if step < total and rate != was:
            message += f"; the learning rate of step {step + 1} is {rate:.3g} instead of {was:.3g}, and the run ends at step {total}"
        yield Finding("resume", "info", step, message, (), {"total_before": int(state["total"]), "total": total, "learning_rate": rate})

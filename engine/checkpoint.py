"""Saving and proving: a checkpoint is a verified folder or it is not there.

Everything is written into a hidden sibling folder, on disk and read back against its digests before one rename makes it
a checkpoint; a kill at any instant leaves the older ones and at most a hidden folder that the next save sweeps away.
Tensors are safetensors and the rest JSON, so nothing that is loaded can run code. Which checkpoints there are, and which
of them count, is the room `shelf`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from qlora_tui.engine import shelf
from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.errors import CheckpointError, SpaceError
from qlora_tui.engine.fast import pissa, states
from qlora_tui.engine.fast.lora import adapter_parts
from qlora_tui.engine.places import discard, published
from qlora_tui.engine.shelf import ADAPTER_WEIGHTS, CHECKPOINTS, OPTIMIZER, RANDOM, STATE, last_healthy

__all__ = ["dry_save", "folder_bytes", "last_healthy", "read_adapter", "read_state", "restore", "save", "write_adapter"]


def save(folder: Path, step: int, model: PeftModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], kind: str = "step") -> Path:
    """Write the checkpoint of `step` below `folder` and return it; `state` is whatever JSON the loop must remember.

    Args:
        folder: the run.
        step: optimizer steps behind us.
        model: its adapter is saved.
        optimizer: its state is saved.
        state: what else a resume needs.
        kind: "step", or another word for one that nobody resumes from, such as "diagnostic".

    Raises:
        SpaceError: the disk is full or cannot be written; nothing half-written stays, and an older one of this step stays whole.
        CheckpointError: what the disk gives back is not what was written.
    """
    path = folder / CHECKPOINTS / shelf.name_of(step, kind)
    with _published(path, f"the checkpoint of step {step}") as partial:
        digests = _write_parts(partial, model, optimizer, {"step": step, **state})
        shelf.write_manifest(partial, step, digests)
        shelf.verify(partial)
    return path


def dry_save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> int:
    """Write, prove and remove a checkpoint before there is anything to lose; returns its bytes.

    An optimizer that has not stepped yet has no state, so zeros of the same size stand for its moments.

    Raises:
        SpaceError: the disk is full or cannot be written.
        CheckpointError: what the disk gives back is not what was written.
    """
    home = folder / CHECKPOINTS
    with _told("a checkpoint", home):
        _make_home(home)
        with _lent(home) as partial:
            digests = _write_parts(partial, model, optimizer, {"step": 0, **state})
            if not optimizer.state:
                _write_tensors(partial / OPTIMIZER, states.zeros(optimizer), digests)
            shelf.write_manifest(partial, 0, digests)
            shelf.verify(partial)
            return folder_bytes(partial)


def restore(path: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a verified checkpoint back into model, optimizer and random generators; return the loop's state.

    Everything is read and compared before anything is changed.

    Raises:
        CheckpointError: something is missing, damaged or does not belong to this model.
    """
    shelf.verify(path)
    weights, tensors, generators = (_read_tensors(path / name) for name in (ADAPTER_WEIGHTS, OPTIMIZER, RANDOM))
    state = read_state(path)
    _check_adapter(path, model, weights)
    states.check(optimizer, tensors, state["optimizer"], str(path))
    if "cpu" not in generators:
        raise CheckpointError("the state of the random generator is missing from the checkpoint", where=str(path))
    set_peft_model_state_dict(model, pissa.split(model, weights))
    states.restore(optimizer, tensors, state["optimizer"])
    _restore_random(generators, state["python_random"])
    return state


def read_adapter(path: Path, model: PeftModel) -> None:
    """Put the adapter that lies in `path`, a checkpoint or what a run left, on `model`.

    Raises:
        CheckpointError: it cannot be read, or is none of this model's.
    """
    weights = _read_tensors(path / ADAPTER_WEIGHTS)
    _check_adapter(path, model, weights)
    set_peft_model_state_dict(model, pissa.split(model, weights))


def write_adapter(folder: Path, model: PeftModel, base_name: str, tokenizer: Tokenizer) -> Path:
    """Write `adapter/` in PEFT's layout with the tokenizer and the chat template that was trained.

    An older one stays whole until the new one takes its name.

    Raises:
        SpaceError: it could not be written.
        CheckpointError: what was written reads back empty or not finite.
    """
    with _published(folder / "adapter", "the adapter") as partial:
        _write_peft(partial, model, base_name, {})
        tokenizer.save(partial)
        _prove_adapter(partial)
    return folder / "adapter"


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files below `folder` hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def _published(target: Path, what: str) -> Iterator[Path]:
    with _told(what, target.parent):
        _make_home(target.parent)
        with published(target) as partial:
            yield partial


@contextmanager
def _lent(home: Path) -> Iterator[Path]:
    """Lend a folder that is filled and put on the disk as a checkpoint is, and then removed instead of renamed."""
    target = home / "dry"
    try:
        with published(target) as partial:
            yield partial
    finally:
        discard(target)


def _make_home(home: Path) -> None:
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink():
        raise CheckpointError(f"{home.name} is a link", where=str(home.parent), hint="remove it: it may lead out of this run")


@contextmanager
def _told(what: str, where: Path) -> Iterator[None]:
    """Turn what the disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise SpaceError(f"{what} could not be written: {error.strerror or error}", where=str(where)) from error


def _write_peft(folder: Path, model: PeftModel, base_name: str, digests: dict[str, str]) -> None:
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    pissa.joined_config(model, config).save_pretrained(folder)
    weights = pissa.joined(model, _adapter(model))
    weights = {name: part.detach().cpu().contiguous().clone() for name, part in weights.items()}
    _write_tensors(folder / ADAPTER_WEIGHTS, weights, digests, metadata={"format": "pt"})


def _adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by PEFT's names.

    PEFT left to itself asks the whole model: each 4-bit layer packs its constants again, and reads a base that a pause has freed.
    """
    own: dict[str, torch.Tensor] = {}
    for name, part in adapter_parts(model):
        own |= part.state_dict(prefix=f"{name}.")
    return dict(get_peft_model_state_dict(model, state_dict=own))


def _prove_adapter(folder: Path) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if not weights:
        raise CheckpointError("the adapter that was written is empty", where=str(folder))
    broken = [name for name, part in weights.items() if not bool(torch.isfinite(part).all())]
    if broken:
        raise CheckpointError(f"the adapter holds numbers that are not finite ({broken[0]})", where=str(folder))


def _write_parts(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, str]:
    """Write everything but the manifest and return the digest of each part as it should lie there."""
    digests: dict[str, str] = {}
    _write_peft(folder, model, str(model.peft_config["default"].base_model_name_or_path), digests)
    tensors, rest = states.split(optimizer)
    _write_tensors(folder / OPTIMIZER, tensors, digests)
    _write_tensors(folder / RANDOM, _random_tensors(), digests)
    state = state | {"optimizer": rest, "python_random": _plain_random()}
    _write(folder / STATE, json.dumps(state).encode(), digests)
    return digests


def _write_tensors(file: Path, tensors: dict[str, torch.Tensor], digests: dict[str, str], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors; through bytes, because the library's own writer hides a full disk in an error of its own."""
    _write(file, to_bytes(tensors, metadata=metadata), digests)


def _write(file: Path, content: bytes, digests: dict[str, str]) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    digests[file.name] = hashlib.sha256(content).hexdigest()


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file.name} holds no tensors that can be read", where=str(file.parent)) from error


def read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint remembers beside the tensors.

    Raises:
        CheckpointError: it cannot be read or lacks a part.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        lost = [name for name in ("step", "watch", "optimizer", "python_random") if name not in state]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{STATE} cannot be read", where=str(path)) from error
    if lost:
        raise CheckpointError(f"{STATE} does not hold {lost[0]}", where=str(path))
    return state


def _check_adapter(path: Path, model: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    known = pissa.joined(model, _adapter(model))
    if {name: part.shape for name, part in weights.items()} != {name: part.shape for name, part in known.items()}:
        raise CheckpointError("the adapter in the checkpoint has other layers or another rank than this run", where=str(path))


def _random_tensors() -> dict[str, torch.Tensor]:
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    return generators


def _plain_random() -> list[Any]:
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _restore_random(generators: dict[str, torch.Tensor], python: list[Any]) -> None:
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    random.setstate((python[0], tuple(python[1]), python[2]))

"""Saving and proving: a checkpoint is a verified folder or it is not there.

Everything is written into a hidden sibling folder, hashed, fsynced and renamed; a kill at any instant leaves
the older checkpoints and at most one hidden folder that the next save sweeps away. Tensors are safetensors and
the rest JSON, so nothing that is loaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qlora_tui.engine.data import Tokenizer
from qlora_tui.engine.errors import CheckpointError, SpaceError
from qlora_tui.engine.fast import pissa
from qlora_tui.engine.places import sync_folder

FORMAT = 1
MANIFEST, STATE, OPTIMIZER, RANDOM, ADAPTER_WEIGHTS = (
    "manifest.json",
    "state.json",
    "optimizer.safetensors",
    "random.safetensors",
    "adapter_model.safetensors",
)


def save(folder: Path, step: int, model: PeftModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step-…` below `folder` and return it; `state` is whatever JSON the loop must remember.

    Raises:
        SpaceError: the disk is full or cannot be written; nothing half-written stays.
    """
    home = folder / "checkpoints"
    with _published(home / f"step-{step:06d}", f"the checkpoint of step {step}") as partial:
        _write_parts(partial, model, optimizer, {"step": step, **state})
        _write_manifest(partial)
    return home / f"step-{step:06d}"


def restore(path: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a verified checkpoint back into model, optimizer and random generators; return the loop's state.

    Raises:
        CheckpointError: something is missing, damaged or does not belong to this model.
    """
    verify(path)
    weights = load_file(path / ADAPTER_WEIGHTS)
    known = pissa.joined(model, get_peft_model_state_dict(model))
    if {name: part.shape for name, part in weights.items()} != {name: part.shape for name, part in known.items()}:
        raise CheckpointError("the adapter in the checkpoint has other layers or another rank than this run", where=str(path))
    set_peft_model_state_dict(model, pissa.split(model, weights))
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    _restore_optimizer(optimizer, load_file(path / OPTIMIZER), state["optimizer"])
    _restore_random(load_file(path / RANDOM), state["python_random"])
    return state


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file against it.

    Raises:
        CheckpointError: the first file that is missing or differs, by name.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError("the checkpoint has no readable manifest", where=str(path)) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint was written in format {manifest.get('format')}; this version reads {FORMAT}", where=str(path)
        )
    for name, said in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing from the checkpoint", where=str(path))
        if file.stat().st_size != said["bytes"] or _sha256(file) != said["sha256"]:
            raise CheckpointError(f"{name} is damaged: it is not what was saved", where=str(path))
    for name in (STATE, OPTIMIZER, RANDOM, ADAPTER_WEIGHTS):
        if name not in files:
            raise CheckpointError(f"{name} is missing from the checkpoint", where=str(path))
    return manifest


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that proves sound, and a sentence for each newer one that does not."""
    damaged: list[str] = []
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return path, damaged
    return None, damaged


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints; called only after a newer one was proved."""
    for path in sorted((folder / "checkpoints").glob("step-*"))[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def write_adapter(folder: Path, model: PeftModel, base_name: str, tokenizer: Tokenizer) -> Path:
    """Write `adapter/` in PEFT's layout with the tokenizer and the chat template that was trained, replacing an older one whole.

    Raises:
        SpaceError: it could not be written.
        CheckpointError: what was written reads back empty or not finite.
    """
    with _published(folder / "adapter", "the adapter") as partial:
        _write_peft(partial, model, base_name)
        tokenizer.save(partial)
        _prove_adapter(partial)
    return folder / "adapter"


@contextmanager
def _published(target: Path, what: str) -> Iterator[Path]:
    """Lend a hidden folder beside `target` and rename it over once it is filled; on any fault nothing half-written stays."""
    partial = target.with_name(f".partial-{target.name}")
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        for left in target.parent.glob(".partial-*"):
            shutil.rmtree(left)
        partial.mkdir(mode=0o700)
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise SpaceError(f"{what} could not be written: {error.strerror or error}", where=str(target.parent)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files below `folder` hold."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write_peft(folder: Path, model: PeftModel, base_name: str) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    pissa.joined_config(model, config).save_pretrained(folder)
    weights = pissa.joined(model, get_peft_model_state_dict(model))
    weights = {name: part.detach().cpu().contiguous().clone() for name, part in weights.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _prove_adapter(folder: Path) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    if not weights:
        raise CheckpointError("the adapter that was written is empty", where=str(folder))
    broken = [name for name, part in weights.items() if not bool(torch.isfinite(part).all())]
    if broken:
        raise CheckpointError(f"the adapter holds numbers that are not finite ({broken[0]})", where=str(folder))


def _write_parts(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged optimizer state is read from the host below
    _write_peft(folder, model, str(model.peft_config["default"].base_model_name_or_path))
    tensors, rest = _split_optimizer(optimizer)
    save_file(tensors, folder / OPTIMIZER)
    save_file(_random_tensors(), folder / RANDOM)
    state = state | {"optimizer": rest, "python_random": _plain_random()}
    (folder / STATE).write_text(json.dumps(state))


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listed = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))
    for file in (*files, folder / MANIFEST):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.chmod(0o600)
    sync_folder(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the optimizer's tensors by `index.name`, and the numbers beside them.

    bitsandbytes shares its quantization maps between parameters, and safetensors stores no shared memory, so
    every tensor is cloned on the way.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"numbers": numbers, "kind": type(optimizer).__name__}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Fill the optimizer's state in place of what its first step would make.

    bitsandbytes makes its state through `init_state` (paged where asked), so its tensors are made that way
    and filled: loading them as plain tensors would silently give up paging.
    """
    if rest["kind"] != type(optimizer).__name__:
        raise CheckpointError(f"the checkpoint's optimizer is {rest['kind']}, this run's is {type(optimizer).__name__}")
    places = [(number, within) for number, group in enumerate(optimizer.param_groups) for within in range(len(group["params"]))]
    for index, (number, within) in enumerate(places):
        group = optimizer.param_groups[number]
        parameter = group["params"][within]
        saved = {name.split(".", 1)[1]: part for name, part in tensors.items() if name.startswith(f"{index}.")}
        if saved and isinstance(optimizer, Optimizer8bit) and not optimizer.state.get(parameter):  # a paged buffer is never freed
            optimizer.init_state(group, parameter, number, within)
        state = optimizer.state[parameter]
        for name, part in saved.items():
            if name in state:
                state[name].copy_(part)
            else:
                state[name] = part if name == "step" else part.to(parameter.device)
        state.update(rest["numbers"].get(str(index), {}))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _random_tensors() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _plain_random() -> list[Any]:
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _restore_random(states: dict[str, torch.Tensor], python: list[Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate((python[0], tuple(python[1]), python[2]))

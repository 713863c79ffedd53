"""A corpus of damaged checkpoints: none of them is loaded, each is named in one sentence, and the older one is used."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import drive
from safetensors.torch import save_file

from qlora_tui.engine import checkpoint, shelf
from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.events import Finding, Resumed, Stepped
from qlora_tui.engine.load import load, trainable
from qlora_tui.engine.resume import trained_with
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import build_optimizer, flatten

Make = Callable[..., RunConfig]
EVERY_PART = (*shelf.PARTS, "adapter_config.json", shelf.MANIFEST)
PLACES = 20


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def two(run_of: Make, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run of four steps with checkpoints of steps 2 and 4."""
    run = run_of(max_steps=4, save_steps=2, eval_steps=100)
    folder = drive(run, tmp_path / "run").folder
    assert shelf.steps(folder) == [2, 4]
    return run, folder


def damages(folder: Path, bomb: Path) -> list[tuple[str, Callable[[], object]]]:
    """Return every way to damage the checkpoint of step 4 of the run in `folder`, by name."""
    path = shelf.path_of(folder, 4)
    found: list[tuple[str, Callable[[], object]]] = []
    for name in EVERY_PART:
        file, content = path / name, (path / name).read_bytes()
        wrong = {f"{name} cut to {size}": content[:size] for size in (0, len(content) // 2, len(content) - 1)}
        for place in {len(content) * number // PLACES for number in range(PLACES)} | {len(content) - 1}:
            wrong[f"{name} flipped at {place}"] = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        wrong |= {f"{name} longer": content + b"\0", f"{name} a pickle": pickle.dumps(Bomb(bomb))}
        found += [(told, partial(file.write_bytes, part)) for told, part in wrong.items()]
        found.append((f"{name} missing", file.unlink))
        found.append((f"{name} a folder", lambda file=file: (file.unlink(), file.mkdir())))  # type: ignore[misc]
        other = folder / "elsewhere" / name
        found.append((f"{name} a link", lambda file=file, other=other: (file.unlink(), file.symlink_to(other))))  # type: ignore[misc]
    manifest = json.loads((path / shelf.MANIFEST).read_text())
    for version in (1, 3, "2", None):
        text = shelf._sealed({**{key: manifest[key] for key in ("step", "files")}, "format": version})
        found.append((f"format {version}", lambda text=text: (path / shelf.MANIFEST).write_text(text)))  # type: ignore[misc]
    escaped = shelf._sealed(
        {"format": shelf.FORMAT, "step": 4, "files": {**manifest["files"], "../../run.toml": {"bytes": 1, "sha256": ""}}}
    )
    found.append(("a name that leads out", lambda: (path / shelf.MANIFEST).write_text(escaped)))
    found.append(("a link in its place", lambda: (path.rename(folder / "moved"), path.symlink_to(folder / "moved"))))
    return found


def test_no_damaged_checkpoint_is_ever_loaded(two: tuple[RunConfig, Path], tmp_path: Path) -> None:
    folder = two[1]
    bomb, silent = tmp_path / "bomb", []
    (folder / "elsewhere").mkdir()
    for part in EVERY_PART:
        shutil.copy(shelf.path_of(folder, 4) / part, folder / "elsewhere")  # a link to the very same bytes is a link too
    sound = shutil.copytree(folder, tmp_path / "sound")
    corpus = damages(folder, bomb)
    for name, damage in corpus:
        damage()
        path, told = shelf.newest(folder)
        if path != shelf.path_of(folder, 2):
            silent.append(name)
        assert len(told) == 1, name
        assert "\n" not in told[0]
        assert shelf.newest_step(folder) == 2
        assert trained_with(folder) is not None
        shutil.rmtree(folder)
        shutil.copytree(sound, folder, symlinks=True)
    assert silent == []
    assert len(corpus) > 150
    assert not bomb.exists()


def test_every_byte_of_a_manifest_and_of_the_index_is_sealed(two: tuple[RunConfig, Path]) -> None:
    _, folder = two
    path = shelf.path_of(folder, 4)
    index = folder / "checkpoints" / shelf.INDEX
    for file, silent in (
        (path / shelf.MANIFEST, lambda: shelf.newest_step(folder) == 4),
        (index, lambda: shelf.marks(folder) != shelf.Marks()),
    ):
        content = file.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1
            file.write_bytes(flipped)
            assert not silent(), place
        file.write_bytes(content)
        assert silent()


def test_a_damaged_index_costs_no_checkpoint(two: tuple[RunConfig, Path]) -> None:
    folder = two[1]
    (folder / "checkpoints" / shelf.INDEX).write_text("{")
    assert shelf.last_healthy(folder) is None
    assert shelf.newest_step(folder) == 4


@pytest.mark.parametrize("name", shelf.PARTS)
def test_a_bomb_with_the_right_hash_does_not_go_off(two: tuple[RunConfig, Path], tmp_path: Path, name: str) -> None:
    """Somebody who can write the folder can seal anything; what is sealed still is data and nothing else."""
    run, folder = two
    path = shelf.path_of(folder, 4)
    (path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    (path / shelf.MANIFEST).unlink()
    shelf.write_manifest(path, 4, {})
    assert shelf.newest_step(folder) == 4
    ran = drive(run, folder, resume=True)
    assert isinstance(ran.error, CheckpointError)
    assert f"{name} cannot be read" in str(ran.error) or f"{name} holds no tensors that can be read" in str(ran.error)
    assert not ran.of(Stepped)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin", "pytorch_model.bin"],
)
def test_a_pickle_beside_the_parts_is_never_opened(two: tuple[RunConfig, Path], tmp_path: Path, name: str) -> None:
    run, folder = two
    (shelf.path_of(folder, 4) / name).write_bytes(pickle.dumps(Bomb(tmp_path / "bomb")))
    assert drive(run, folder, resume=True).error is None
    assert not (tmp_path / "bomb").exists()


def test_the_older_one_is_used_and_the_damage_is_told(two: tuple[RunConfig, Path]) -> None:
    run, folder = two
    weights = shelf.path_of(folder, 4) / shelf.ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    ran = drive(run, folder, resume=True)
    assert [event.to_step for event in ran.of(Resumed)] == [2]
    assert f"{shelf.ADAPTER_WEIGHTS} is damaged: " in ran.of(Finding)[0].message
    assert "an older checkpoint is used" in ran.of(Finding)[0].message
    assert shelf.newest_step(folder) == 4  # saved anew, in place of the damaged one


def sealed_again(path: Path) -> Path:
    (path / shelf.MANIFEST).unlink()
    shelf.write_manifest(path, 4, {})
    return path


@pytest.mark.parametrize(
    "fault",
    ["of 1 tensors, and this run trains", "exp_avg of tensor 0 has another shape", "state of the random generator", "does not hold watch"],
)
def test_sealed_parts_that_do_not_fit_are_refused(two: tuple[RunConfig, Path], fault: str) -> None:
    from loop_driver import CPU
    from safetensors.torch import load_file

    run, folder = two
    path = shelf.path_of(folder, 4)
    optimizer = {name: part.clone() for name, part in load_file(path / shelf.OPTIMIZER).items()}
    state = json.loads((path / shelf.STATE).read_text())
    match fault[:3]:
        case "of ":
            save_file({name: part for name, part in optimizer.items() if name.startswith("0.")}, path / shelf.OPTIMIZER)
        case "exp":
            save_file({**optimizer, "0.exp_avg": torch.zeros(1, 1)}, path / shelf.OPTIMIZER)
        case "sta":
            save_file({"other": torch.zeros(1)}, path / shelf.RANDOM)
        case _:
            (path / shelf.STATE).write_text(json.dumps({name: value for name, value in state.items() if name != "watch"}))
    loaded = load(run, Path(run.model_name_or_path), CPU)
    optimizer_now = build_optimizer(run, flatten(run, trainable(loaded.model), loaded.device), loaded.device)
    with pytest.raises(CheckpointError, match=fault):
        checkpoint.restore(sealed_again(path), loaded.model, optimizer_now)

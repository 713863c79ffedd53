"""SIGKILL at every write, fsync, rename and removal of a run, and at random times: every resume works and nothing saved is lost.

Three scenes: a run from its start; a further attempt that replaces an adapter and a damaged checkpoint, where the file system
can exchange two names; and the same where it cannot. CI takes every tenth instant, `--slow` all of them.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kill_server import Server
from safetensors.torch import load_file
from torch import equal

from qlora_tui.engine import shelf
from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.events import Finished, Resumed, Saved
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.places import settle

STEPS, EVERY = 4, 10
KILLED = -9
SCENES = ("from the start", "replacing", "replacing without exchange")


@dataclass
class Scene:
    """Where every attempt begins, what it should end with, and how many instants and seconds it takes when nobody kills it."""

    server: Server
    run: dict[str, Any]
    template: Path
    exchange: bool
    scratch: Path
    wanted: dict[str, Any] = field(default_factory=dict)
    instants: int = 0
    seconds: float = 0.0

    def begin(self) -> Path:
        folder = self.scratch / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder)
        folder.chmod(0o700)
        return folder

    def attempt(self, folder: Path, **how: Any) -> tuple[int, int]:
        return self.server.attempt(self.run, folder, exchange=self.exchange, **how)


def everything(folder: Path) -> dict[str, Any]:
    """Return all that a finished run leaves and that must not depend on how often it was killed."""
    path = shelf.path_of(folder, STEPS)
    shelf.verify(path)
    found: dict[str, Any] = {"adapter": tensors(folder / "adapter" / shelf.ADAPTER_WEIGHTS)}
    found |= {name: tensors(path / name) for name in shelf.PARTS if name.endswith(".safetensors")}
    state = json.loads((path / shelf.STATE).read_text())
    return found | {"state": {name: state[name] for name in ("step", "watch", "python_random", "optimizer")}}


def tensors(file: Path) -> dict[str, Any]:
    """Return copies: what `load_file` gives is a view of a file that a test goes on to damage."""
    return {name: part.clone() for name, part in load_file(file).items()}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left["state"] == right["state"] and all(
        left[part].keys() == right[part].keys() and all(equal(left[part][name], right[part][name]) for name in left[part])
        for part in left
        if part != "state"
    )


@pytest.fixture(scope="module")
def scenes(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    home = tmp_path_factory.mktemp("scenes")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "abc " * (1 + n % 7)}]} for n in range(20)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "model_name_or_path": str(tiny_model),
        "data": [str(home / "rows.jsonl")],
        "method": "lora",
        "final_checks": False,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "gradient_checkpointing": "false",
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj"],
        "save_steps": 2,
        "eval_steps": 3,
        "save_total_limit": 2,
    }
    (home / "empty").mkdir()
    done = home / "done"
    assert server.attempt(run, done)[0] == 0
    damaged = shelf.path_of(done, STEPS) / shelf.OPTIMIZER
    wanted = everything(done)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    made = {}
    for number, name in enumerate(SCENES):
        (home / str(number)).mkdir()
        made[name] = Scene(server, run, done if number else home / "empty", number < 2, home / str(number), wanted)
        folder, began = made[name].begin(), time.monotonic()
        code, made[name].instants = made[name].attempt(folder)
        made[name].seconds = time.monotonic() - began
        assert code == 0
        assert same(everything(folder), wanted)
    return made


def survive(scene: Scene, **how: Any) -> tuple[bool, int]:
    """Kill one attempt, resume it and check every promise; returns whether it was killed and from which step it went on."""
    folder = scene.begin()
    known = {step for step in shelf.steps(folder) if not sound(shelf.path_of(folder, step))}
    before = shelf.newest_step(folder) or 0
    past = len(read_records(folder / EVENTS))
    code, _ = scene.attempt(folder, **how)
    assert code in (0, KILLED)
    records = read_records(folder / EVENTS)[past:]
    said = [record.event.step for record in records if isinstance(record.event, Saved) and record.event.kind == "checkpoint"]
    for step in shelf.steps(folder):
        assert step in known or sound(shelf.path_of(folder, step)), f"half a checkpoint of step {step}"
    settle(folder)  # where names cannot be exchanged, a resume first puts back what was set aside
    if (scene.template / "adapter").exists():
        assert whole_adapter(folder), "the adapter was lost"
    newest = shelf.newest_step(folder) or 0
    assert newest >= max([before, *said]), "a saved checkpoint was lost"
    healthy = shelf.last_healthy(folder)
    assert healthy is None or sound(healthy)
    again = len(read_records(folder / EVENTS))
    assert scene.attempt(folder)[0] == 0, "the resume failed"
    records = read_records(folder / EVENTS)[again:]
    assert [record.event.to_step for record in records if isinstance(record.event, Resumed)] in ([newest], [] if not newest else [newest])
    assert [record.event.outcome for record in records if isinstance(record.event, Finished)] == ["done"]
    assert same(everything(folder), scene.wanted), "not the uninterrupted run"
    assert [path.name for path in folder.rglob(".partial*")] + [path.name for path in folder.rglob(".aside*")] == []
    return code == KILLED, newest


def sound(path: Path) -> bool:
    try:
        shelf.verify(path)
    except CheckpointError:
        return False
    return True


def whole_adapter(folder: Path) -> bool:
    load_file(folder / "adapter" / shelf.ADAPTER_WEIGHTS)
    json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return (folder / "adapter" / "tokenizer.json").is_file()


def sweep(scene: Scene, instants: range) -> list[int]:
    went = [survive(scene, at=at) for at in instants]
    assert sum(killed for killed, _ in went) >= len(went) - 3  # the device sampler may add or spare an instant at the end
    return [step for _, step in went]


@pytest.mark.parametrize("name", SCENES)
def test_a_kill_at_every_tenth_instant(scenes: dict[str, Scene], name: str) -> None:
    went = sweep(scenes[name], range(EVERY // 2, scenes[name].instants, EVERY))
    assert len(set(went)) > 1  # kills fell before and after a save


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_a_kill_at_every_instant(scenes: dict[str, Scene], name: str, record: Callable[[str], None]) -> None:
    went = sweep(scenes[name], range(1, scenes[name].instants + 1))
    record(f"{name}: {len(went)} kills, resumed from { ({step: went.count(step) for step in sorted(set(went))}) }")


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_at_random_times(scenes: dict[str, Scene], kills: int, record: Callable[[str], None]) -> None:
    dice = random.Random(kills)
    went = []
    for number in range(kills):
        scene = scenes[SCENES[number % len(SCENES)]]
        went.append(survive(scene, after=dice.uniform(0.0, scene.seconds)))
    record(f"random times: {sum(killed for killed, _ in went)} of {kills} killed before their end")

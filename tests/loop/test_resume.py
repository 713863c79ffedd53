"""Resume is exact or says precisely why not: every step, every tensor, and everything that could have changed meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine import shelf
from qlora_tui.engine.errors import CheckpointError, ConfigErrors
from qlora_tui.engine.events import Finding, Resumed, Stepped
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import resume
from qlora_tui.engine.train.schedule import learning_rate

Make = Callable[..., RunConfig]
STEPS = 12


def everything(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Return all tensors of a checkpoint and all it remembers beside them."""
    shelf.verify(path)
    parts = {name: load_file(path / name) for name in shelf.PARTS if name.endswith(".safetensors")}
    return parts, json.loads((path / shelf.STATE).read_text())


def same(left: Path, right: Path) -> bool:
    (tensors, state), (others, other) = everything(left), everything(right)
    return state == other and all(
        tensors[part].keys() == others[part].keys() and all(torch.equal(tensors[part][name], others[part][name]) for name in tensors[part])
        for part in tensors
    )


def cut_back(folder: Path, step: int, to: Path) -> Path:
    """Return a copy of a run as a kill right after the save of `step` would have left it."""
    shutil.copytree(folder, to)
    for other in shelf.steps(to):
        if other > step:
            shutil.rmtree(shelf.path_of(to, other))
    shutil.rmtree(to / "adapter")
    return to


VARIANTS = {
    "lora": {"lora_dropout": 0.1},
    "lora plus": {"lora_dropout": 0.1, "loraplus_lr_ratio": 4.0, "lr_scheduler_type": "linear"},
    "qlora, 8-bit optimizer": {"method": "qlora", "optim": "adamw_8bit"},
    "8-bit base": {"method": "lora-8bit"},
    "fused layers": {"method": "qlora", "dtype": "bfloat16", "gradient_checkpointing": "1"},
    "fused layers, 8-bit base, rows end to end": {"method": "lora-8bit", "dtype": "bfloat16", "packing": "on"},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_resume_at_every_step_is_the_uninterrupted_run(run_of: Make, tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    """36 rows, 2 x 2 a step: step 9 ends the first epoch; all later checkpoints are compared, to the last bit."""
    if kind.startswith("fused layers"):
        request.getfixturevalue("fused_on_cpu")
    run = run_of(max_steps=STEPS, save_steps=1, save_total_limit=STEPS, eval_steps=4, **VARIANTS[kind])
    whole = drive(run, tmp_path / "whole")
    assert shelf.steps(whole.folder) == list(range(1, STEPS + 1))
    for cut in range(1, STEPS):
        rest = drive(run, cut_back(whole.folder, cut, tmp_path / f"from-{cut}"), resume=True)
        assert rest.error is None
        assert [event.to_step for event in rest.of(Resumed)] == [cut]
        assert [event.step for event in rest.of(Stepped)] == list(range(cut + 1, STEPS + 1))
        assert all(same(shelf.path_of(whole.folder, step), shelf.path_of(rest.folder, step)) for step in range(cut + 1, STEPS + 1)), cut
        assert load_file(rest.folder / "adapter" / shelf.ADAPTER_WEIGHTS).keys()


def test_a_resume_that_goes_further_says_what_becomes_of_the_learning_rate(run_of: Make, tmp_path: Path) -> None:
    drive(run_of(max_steps=4), tmp_path / "run")
    longer = run_of(max_steps=8, save_steps=3, eval_steps=2, save_total_limit=5, max_time=3600.0)
    rest = drive(longer, tmp_path / "run", resume=True)
    assert rest.error is None
    (said,) = [finding for finding in rest.of(Finding) if finding.detector == "resume"]
    rate = learning_rate(longer, 5, 8)
    for words in ("max_steps=8", "save_steps=3", f"the learning rate of step 5 is {rate:.3g} instead of 0", "the run ends at step 8"):
        assert words in said.message
    assert [step.lr for step in rest.of(Stepped)] == [learning_rate(longer, step, 8) for step in range(5, 9)]


@pytest.mark.parametrize("values", [{"learning_rate": 1e-4}, {"seed": 7}, {"lora_r": 4}, {"gradient_accumulation_steps": 4}])
def test_a_resume_that_would_be_another_run_is_refused(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    drive(run_of(max_steps=2), tmp_path / "run")
    ran = drive(run_of(max_steps=4, **values), tmp_path / "run", resume=True)
    assert isinstance(ran.error, ConfigErrors)
    assert ran.error.exit_code == 2
    assert [problem.where for problem in ran.error.problems] == list(values)
    assert not ran.of(Stepped)


def refused(ran: Ran) -> str:
    assert isinstance(ran.error, CheckpointError)
    assert ran.error.exit_code == 2
    assert not ran.of(Stepped)
    return str(ran.error)


def test_rows_that_changed_behind_the_run_are_refused(run_of: Make, tmp_path: Path) -> None:
    run = run_of(max_steps=2)
    drive(run, tmp_path / "run")
    data = Path(run.data[0])
    data.write_text(data.read_text().replace("say 12", "say 21"))  # as long as before, in one row
    assert "the rows are not those that the run began with" in refused(drive(run, tmp_path / "run", resume=True))


def test_a_base_that_changed_behind_the_run_is_refused(run_of: Make, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    write_tokenizer(model)
    run = run_of(model_name_or_path=str(model), max_steps=2)
    drive(run, tmp_path / "run")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "the base's weights are not those that the run began with" in refused(drive(run, tmp_path / "run", resume=True))


def test_other_libraries_are_told_and_allowed(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(max_steps=4, save_steps=2)
    monkeypatch.setattr(resume.metadata, "version", lambda name: f"0 of {name}")
    drive(run_of(max_steps=2), tmp_path / "run")
    monkeypatch.undo()
    rest = drive(run, tmp_path / "run", resume=True)
    assert rest.error is None
    assert any("written with other libraries (torch 0 of torch -> " in finding.message for finding in rest.of(Finding))


def test_a_run_that_never_saved_starts_again_and_says_so(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=1), tmp_path / "run", resume=True)
    assert [event.to_step for event in ran.of(Resumed)] == [0]
    assert [step.step for step in ran.of(Stepped)] == [1]

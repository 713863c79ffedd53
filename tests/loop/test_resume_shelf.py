"""Which checkpoints stay: the latest, the last healthy one and the best, whatever else is pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import Asked, drive

from qlora_tui.engine import checkpoint, shelf
from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.events import Evaluated, Finding, MarkedHealthy, Phase, Saved, Stepped
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import keeper, loop

Make = Callable[..., RunConfig]


def test_only_the_newest_stay_and_those_that_count(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=24, save_steps=1, eval_steps=100, save_total_limit=2), tmp_path / "run")
    assert shelf.steps(ran.folder) == [9, 17, 23, 24]  # 9 is healthy, ten clean steps came after it; 17 may become it
    known = shelf.marks(ran.folder)
    assert (known.latest, known.healthy, known.best) == (24, 9, 24)
    assert checkpoint.last_healthy(ran.folder) == shelf.path_of(ran.folder, 9)
    assert [event.step for event in ran.of(MarkedHealthy)] == [1, 9]


def test_the_best_stays_when_the_run_gets_worse(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate explodes after step 4, so what was measured there stays the best."""
    real = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda run, step, total: 3.0 if step > 4 else real(run, step, total))
    ran = drive(run_of(max_steps=9, save_steps=1, eval_steps=2, save_total_limit=1), tmp_path / "run")
    measured = {event.step: event.loss for event in ran.of(Evaluated) if event.step}
    assert min(measured, key=measured.__getitem__) == 4
    assert shelf.best(ran.folder) == shelf.path_of(ran.folder, 4)
    assert shelf.marks(ran.folder).best_loss == measured[4]
    assert 4 in shelf.steps(ran.folder)


def test_a_spike_just_after_a_save_keeps_it_from_counting_as_healthy(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "CLEAN_STEPS", 2)
    real = loop.gradient_norm
    seen: list[int] = []

    def poisoned(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        seen.append(1)
        return torch.tensor(math.nan) if len(seen) == 5 else real(parameters)

    monkeypatch.setattr(loop, "gradient_norm", poisoned)
    ran = drive(run_of(max_steps=9, save_steps=2, eval_steps=100), tmp_path / "run")
    assert [step.step for step in ran.of(Stepped) if step.skipped] == [5]
    assert [event.step for event in ran.of(MarkedHealthy)] == [2, 6]  # 4 was saved just before it
    order = [event for event in ran.events if isinstance(event, (Stepped, MarkedHealthy))]
    assert order[order.index(MarkedHealthy(2)) - 1].step == 4  # type: ignore[union-attr]


def test_a_resume_goes_on_waiting_for_clean_steps(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "CLEAN_STEPS", 3)
    run = run_of(max_steps=8, save_steps=2, eval_steps=100)
    drive(run, tmp_path / "run", Asked({4: "stop"}))
    rest = drive(run, tmp_path / "run", resume=True)
    assert [event.step for event in rest.of(MarkedHealthy)] == [2, 4]


def test_a_diagnostic_checkpoint_is_kept_apart(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "gradient_norm", lambda _: torch.tensor(math.nan))
    ran = drive(run_of(max_steps=9, save_steps=2), tmp_path / "run")
    assert [(event.step, event.kind) for event in ran.of(Saved)] == [(2, "checkpoint"), (3, "diagnostic")]
    assert shelf.newest(ran.folder)[0] == shelf.path_of(ran.folder, 2)


def test_a_roll_back_makes_later_checkpoints_void(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = drive(run_of(max_steps=6, save_steps=2, eval_steps=100), tmp_path / "run").folder
    monkeypatch.setattr(shelf, "discard", lambda path: None)  # a kill before anything is removed
    shelf.roll_back(folder, 2)
    assert shelf.steps(folder) == [2, 4, 6]
    assert shelf.newest(folder) == (shelf.path_of(folder, 2), [])
    monkeypatch.undo()
    shelf.roll_back(folder, 2)
    assert shelf.steps(folder) == [2]
    known = shelf.marks(folder)
    assert (known.latest, known.best, known.best_loss, known.void) == (2, None, None, ())


def test_a_checkpoint_saved_again_after_a_roll_back_counts(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(max_steps=6, save_steps=2, eval_steps=100)
    folder = drive(run, tmp_path / "run").folder
    monkeypatch.setattr(shelf, "discard", lambda path: None)
    shelf.roll_back(folder, 2)
    monkeypatch.undo()
    rest = drive(run, folder, Asked({4: "stop"}), resume=True)
    assert [step.step for step in rest.of(Stepped)] == [3, 4]
    assert shelf.newest(folder) == (shelf.path_of(folder, 4), [])
    assert shelf.marks(folder).void == (6,)


def test_steps_are_sorted_as_numbers(tmp_path: Path) -> None:
    for step in (5, 1_000_000, 999_999):
        shelf.path_of(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000005.bak").mkdir()
    assert shelf.steps(tmp_path) == [5, 999_999, 1_000_000]


def test_before_step_1_the_disk_is_proved_and_a_checkpoint_measured(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=2, save_steps=2, eval_steps=100), tmp_path / "run")
    types = [event for event in ran.events if isinstance(event, Stepped) or (isinstance(event, Phase) and event.name == "save")]
    trial = types[1]
    assert isinstance(trial, Phase)
    assert "a checkpoint takes" in trial.note
    assert "the disk has room for" in trial.note
    assert isinstance(types[2], Stepped)
    (saved,) = [event for event in ran.of(Saved) if event.kind == "checkpoint"]
    dry = checkpoint.dry_save(tmp_path / "run", *_fresh(run_of(max_steps=2)), {})
    assert dry == pytest.approx(saved.bytes, rel=0.1)  # what was foretold is what it took
    assert sorted(path.name for path in (ran.folder / "checkpoints").iterdir()) == ["index.json", "step-000002"]


def _fresh(run: RunConfig) -> tuple[Any, Any]:
    from loop_driver import CPU

    from qlora_tui.engine.load import load, trainable
    from qlora_tui.engine.train.optim import build_optimizer, flatten

    loaded = load(run, Path(run.model_name_or_path), CPU)
    return loaded.model, build_optimizer(run, flatten(run, trainable(loaded.model), loaded.device), loaded.device)


def test_a_checkpoint_of_another_adapter_or_optimizer_is_refused_before_anything_changes(run_of: Make, tmp_path: Path) -> None:
    folder = drive(run_of(max_steps=2), tmp_path / "run").folder
    path = shelf.path_of(folder, 2)
    for values, words in (
        ({"lora_r": 4}, "other layers or another rank"),
        ({"optim": "adamw_8bit"}, "the checkpoint's optimizer is AdamW, this run's is AdamW8bit"),
    ):
        model, optimizer = _fresh(run_of(**values))
        before = {name: part.clone() for name, part in model.state_dict().items()}
        random = torch.get_rng_state()
        with pytest.raises(CheckpointError, match=words):
            checkpoint.restore(path, model, optimizer)
        assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert not optimizer.state


def test_no_finding_is_said_of_a_healthy_save(run_of: Make, tmp_path: Path) -> None:
    assert drive(run_of(max_steps=3), tmp_path / "run").of(Finding) == []

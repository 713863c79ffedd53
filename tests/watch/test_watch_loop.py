"""The watch in the loop: a stop that can be undone, a roll back that is exact, and a data change that is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import Asked, Ran, drive

from qlora_tui.engine import load as loaders
from qlora_tui.engine.errors import Diverged
from qlora_tui.engine.events import Evaluated, Finding, Finished, MarkedHealthy, Phase, RolledBack, Saved, Stepped, Wish
from qlora_tui.engine.journal import Journal
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import job
from qlora_tui.engine.train.loop import Loop
from qlora_tui.engine.watch.spike import Spike

Make = Callable[..., RunConfig]
ILL_AT, STEPS = 42, 50


def spoil(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> list[int]:
    """Blow the adapter up before step `ILL_AT`, so often; what is returned fills with the steps at which it happened."""
    real, done = Loop._backward, list[int]()

    def backward(self: Loop, rows: list[Any], supervised: int) -> tuple[float, float]:
        if self.step == ILL_AT - 1 and len(done) < times:
            done.append(self.step)
            with torch.no_grad():
                for parameter in self.fence.trained:
                    parameter.mul_(300)
        return real(self, rows, supervised)

    monkeypatch.setattr(Loop, "_backward", backward)
    return done


def write_down(ran: Ran) -> None:
    """Write the journal that a session would have written of this attempt."""
    journal = Journal(ran.folder)
    for event in ran.events:
        journal.write(event)
    stopped = isinstance(ran.error, Diverged)
    journal.write(Finished("diverged" if stopped else "done", 4 if stopped else 0, str(ran.error or "")))
    journal.close()


def step_of(ran: Ran, number: int, which: int = 0) -> Stepped:
    return [step for step in ran.of(Stepped) if step.step == number][which]


def test_a_stop_keeps_a_diagnosis_names_rows_and_offers_the_way_back(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    ran = drive(run_of(), tmp_path / "run")
    assert isinstance(ran.error, Diverged)
    stop = next(finding for finding in ran.of(Finding) if finding.severity == "stop")
    assert stop.detector == "spike"
    assert ILL_AT + 1 <= stop.step <= ILL_AT + 3
    assert set(step_of(ran, ILL_AT).rows) <= set(stop.numbers["rows"])
    assert [event.step for event in ran.of(Saved) if event.kind == "diagnostic"] == [stop.step]
    healthy = ran.of(MarkedHealthy)[-1].step
    assert f"qlora-tui --resume run goes back to step {healthy} with half the learning rate" in str(ran.error)
    assert str(stop.numbers["rows"][0]) in str(ran.error)


def test_the_offer_holds(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    first = drive(run_of(), tmp_path / "run")
    write_down(first)
    healthy = first.of(MarkedHealthy)[-1].step
    rest = drive(run_of(), tmp_path / "run", resume=True)
    assert rest.result is not None
    assert rest.result.outcome == "done"
    (back,) = rest.of(RolledBack)
    assert (back.to_step, back.rate_factor, back.times) == (healthy, 0.5, 0)
    assert [step.step for step in rest.of(Stepped)] == list(range(healthy + 1, STEPS + 1))
    assert {step.lr for step in rest.of(Stepped)} == {1e-3}
    assert step_of(rest, healthy + 1).loss == step_of(first, healthy + 1).loss


def test_a_resume_that_no_longer_lets_it_stop_goes_on_as_before(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    write_down(drive(run_of(), tmp_path / "run"))
    rest = drive(run_of(watch_stop=()), tmp_path / "run", resume=True)
    assert rest.of(RolledBack) == []
    assert {step.lr for step in rest.of(Stepped)} == {2e-3}


def test_a_roll_back_by_itself_is_exact_and_training_goes_on(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    ran = drive(run_of(watch_rollback=("spike",)), tmp_path / "run")
    assert ran.error is None
    (back,) = ran.of(RolledBack)
    assert (back.rate_factor, back.times) == (0.5, 1)
    again = back.to_step + 1
    before, after = step_of(ran, again), step_of(ran, again, 1)
    assert (before.loss, before.grad_norm, before.rows) == (after.loss, after.grad_norm, after.rows)
    assert (before.lr, after.lr) == (2e-3, 1e-3)
    assert ran.of(Stepped)[-1].step == STEPS
    assert ran.of(Evaluated)[-1].drop > 0


def test_a_roll_back_survives_a_crash_before_the_next_save(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    run = run_of(watch_rollback=("spike",))

    def crash(step: Stepped) -> None:
        if step.lr < 2e-3:
            raise RuntimeError("power cut")

    ran = drive(run, tmp_path / "run", on_step=crash)
    assert str(ran.error) == "power cut"
    write_down(ran)
    rest = drive(run, tmp_path / "run", resume=True)
    assert rest.error is None
    assert {step.lr for step in rest.of(Stepped)} == {1e-3}


CHANGED_AT = ILL_AT - 2
"""The first step with a rate that a person changed; its checkpoint is not the one that is gone back to."""


def changed() -> Asked:
    return Asked(wishes={CHANGED_AT - 1: [Wish("a person", 0.0, 1, "set", {"key": "learning_rate", "factor": 0.5})]})


def test_a_roll_back_halves_what_a_person_made_of_the_rate_and_makes_it_once(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change came after the checkpoint that is gone back to; it still counts, and counts once, and so it does by config."""
    spoil(monkeypatch)
    ran = drive(run_of(watch_rollback=("spike",)), tmp_path / "run", changed())
    assert ran.error is None
    (back,) = ran.of(RolledBack)
    assert back.to_step < CHANGED_AT
    assert back.rate_factor == 0.25
    assert {step.lr for step in ran.of(Stepped)[-5:]} == {0.5e-3}
    spoil(monkeypatch)
    again = drive(run_of(watch_rollback=("spike",), learning_rate_changes=(f"{CHANGED_AT}:0.5",)), tmp_path / "again")
    assert [(step.step, step.lr, step.loss) for step in again.of(Stepped)] == [(step.step, step.lr, step.loss) for step in ran.of(Stepped)]


@pytest.mark.parametrize("by_config", [False, True])
def test_a_crash_after_such_a_roll_back_changes_nothing_of_it(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_config: bool
) -> None:
    spoil(monkeypatch)
    changes = (f"{CHANGED_AT}:0.5",) if by_config else ()
    run = run_of(watch_rollback=("spike",), learning_rate_changes=changes)

    def crash(step: Stepped) -> None:
        if step.lr < 1e-3:
            raise RuntimeError("power cut")

    ran = drive(run, tmp_path / "run", Asked() if by_config else changed(), on_step=crash)
    assert str(ran.error) == "power cut"
    write_down(ran)
    rest = drive(run, tmp_path / "run", resume=True)
    assert rest.error is None
    assert {step.lr for step in rest.of(Stepped)} == {0.5e-3}
    assert rest.of(Stepped)[-1].step == STEPS


def test_by_itself_it_goes_back_twice_and_then_stops(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = spoil(monkeypatch, times=9)
    ran = drive(run_of(watch_rollback=("spike",)), tmp_path / "run")
    assert isinstance(ran.error, Diverged)
    assert [back.times for back in ran.of(RolledBack)] == [1, 2]
    assert [back.rate_factor for back in ran.of(RolledBack)] == [0.5, 0.25]
    assert len(done) == 3


def test_without_a_healthy_checkpoint_it_stops_and_says_so(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    ran = drive(run_of(watch_rollback=("spike",), save_steps=1000), tmp_path / "run")
    assert isinstance(ran.error, Diverged)
    assert "no checkpoint is known to be healthy" in str(ran.error)
    assert ran.of(RolledBack) == []


def test_a_spike_that_held_out_rows_do_not_confirm_is_a_note(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Spike.see

    def sure(self: Spike, step: Stepped) -> Finding | None:
        ill = dataclasses.replace(step, loss=step.loss + 9, grad_norm=step.grad_norm * 9) if step.step in range(40, 44) else step
        return real(self, ill)

    monkeypatch.setattr(Spike, "see", sure)
    ran = drive(run_of(), tmp_path / "run")
    assert ran.error is None
    told = [finding for finding in ran.of(Finding) if finding.detector == "spike" and "the rows changed, not the model" in finding.message]
    assert [finding.severity for finding in told] == ["info"]
    assert [event.step for event in ran.of(Evaluated)] == [0, told[0].step, STEPS]


def test_a_layer_that_cannot_learn_is_named(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loaders.load

    def numb(*args: Any) -> loaders.Loaded:
        loaded = real(*args)
        matrix = next(part for name, part in loaders.trainable(loaded.model).items() if ".lora_A." in name)
        matrix.data.zero_()
        return loaded

    monkeypatch.setattr(job, "load", numb)
    ran = drive(run_of(max_steps=4), tmp_path / "run")
    assert [phase.note for phase in ran.of(Phase) if "not judged on a CPU" in phase.note]
    (found,) = [finding for finding in ran.of(Finding) if finding.detector == "not_learning"]
    assert (found.severity, found.step, found.numbers["zero"]) == ("warn", 3, 1)
    assert "their B is still zero" in found.message


@pytest.mark.parametrize("asked", [("spike",), ()])
def test_what_is_not_asked_to_stop_only_tells(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[str, ...]
) -> None:
    spoil(monkeypatch)
    ran = drive(run_of(watch_stop=asked), tmp_path / "run")
    assert isinstance(ran.error, Diverged) is bool(asked)
    told = [finding.severity for finding in ran.of(Finding) if finding.detector == "spike"]
    assert told
    assert ("stop" in told) is bool(asked)

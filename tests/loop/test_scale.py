"""Gradients in float16: lifted and put back to the bit, done again where they overflow, and known to a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import Asked, drive
from safetensors.torch import load_file

from qlora_tui.engine import preflight
from qlora_tui.engine.events import Finding, Stepped
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.machine import Machine, find_card
from qlora_tui.engine.models import find
from qlora_tui.engine.sizes import compute_type
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import scale
from qlora_tui.engine.train.scale import LossScale

Make = Callable[..., RunConfig]


def lifted(monkeypatch: pytest.MonkeyPatch, factor: float = 2.0**16) -> None:
    """Lift gradients of any type, as those of float16 are."""
    monkeypatch.setattr(LossScale, "of", staticmethod(lambda dtype: LossScale(True, factor)))


def overflowing(monkeypatch: pytest.MonkeyPatch, above: float) -> list[float]:
    """Make gradients overflow under a factor over `above`; returns the factor of each try."""
    real, tried = LossScale.settle, list[float]()

    def settle(self: LossScale, flat: Flat[Any]) -> bool:
        tried.append(self.factor)
        if self.factor > above:
            flat.scale(torch.inf)
        return real(self, flat)

    monkeypatch.setattr(LossScale, "settle", settle)
    return tried


def told(ran: Any) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    assert ran.error is None, ran.error
    steps = [(step.loss, step.grad_norm) for step in ran.of(Stepped)]
    return steps, load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same(left: Any, right: Any) -> bool:
    return left[0] == right[0] and all(torch.equal(left[1][name], part) for name, part in right[1].items())


SETTINGS: dict[str, Any] = {"max_steps": 6, "lora_dropout": 0.1, "save_steps": 2, "save_total_limit": 9}


def test_a_power_of_two_changes_no_bit(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = told(drive(run_of(**SETTINGS), tmp_path / "plain"))
    lifted(monkeypatch)
    assert same(told(drive(run_of(**SETTINGS), tmp_path / "lifted")), plain)


def test_what_overflows_is_done_again_on_the_same_rows_and_random_numbers(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = told(drive(run_of(**SETTINGS), tmp_path / "plain"))
    lifted(monkeypatch)
    tried = overflowing(monkeypatch, above=2.0**14)
    ran = drive(run_of(**SETTINGS), tmp_path / "lifted")
    assert same(told(ran), plain)
    assert tried == [2.0**16, 2.0**15, *[2.0**14] * 6]
    assert not [step for step in ran.of(Stepped) if step.skipped]


def test_a_gradient_that_no_factor_makes_finite_is_skipped_as_ever(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted(monkeypatch)
    tried = overflowing(monkeypatch, above=0.0)
    ran = drive(run_of(**SETTINGS), tmp_path / "run")
    assert [step.skipped for step in ran.of(Stepped)] == [True] * 3
    assert [found.severity for found in ran.of(Finding) if found.detector == "non_finite"][-1] == "stop"
    assert tried == [2.0**power for power in (16, 15, 14, 13, 12, 11)] * 3  # the factor is put back: it was not to blame


def test_the_factor_grows_after_many_steps_and_a_resume_knows_it(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_STEPS", 4)
    lifted(monkeypatch, factor=2.0)
    tried = overflowing(monkeypatch, above=1e9)
    whole = told(drive(run_of(**SETTINGS), tmp_path / "whole"))
    assert tried == [2.0] * 4 + [4.0] * 2
    drive(run_of(**SETTINGS), tmp_path / "part", Asked({5: "stop"}))
    tried.clear()
    rest = drive(run_of(**SETTINGS), tmp_path / "part", resume=True)
    assert tried == [4.0]
    assert torch.equal(*(part["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] for part in (whole[1], told(rest)[1])))


def test_a_run_in_float16_learns(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(dtype="float16", max_steps=12), tmp_path / "run")
    assert ran.error is None
    losses = [step.loss for step in ran.of(Stepped)]
    assert losses[-1] < losses[0] - 0.5
    exact = drive(run_of(max_steps=12), tmp_path / "exact").losses
    assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) < 0.05


def test_who_computes_in_what() -> None:
    auto = RunConfig()
    found = {name: compute_type(auto, find_card(name)) for name in ("T4", "RTX 4090")}
    assert found == {"T4": "float16", "RTX 4090": "bfloat16"}
    assert compute_type(auto, Machine("an old card", "cuda", 8 << 30, bf16=False, compute_capability=(6, 1))) == "float32"
    assert compute_type(auto, Machine("CPU", "cpu", 8 << 30)) == "float32"


@pytest.mark.parametrize(("card", "words"), [("RTX 4090", "overflows nowhere"), ("T4", "")])
def test_float16_is_for_cards_that_have_nothing_better(card: str, words: str) -> None:
    found = [problem for problem in preflight.device_problems(RunConfig(dtype="float16"), find_card(card)) if problem.where == "dtype"]
    assert [words in problem.message for problem in found] == [True] * bool(words)


@pytest.mark.parametrize(
    ("model", "card", "refused"),
    [("google/gemma-3-1b-it", "T4", True), ("google/gemma-3-1b-it", "RTX 4090", False), ("Qwen/Qwen3-4B", "T4", False)],
)
def test_families_that_leave_its_range_are_refused_in_it(model: str, card: str, refused: bool) -> None:
    spec = find(model)
    assert spec is not None
    found = [problem.where for problem in preflight.family_problems(RunConfig(), spec, find_card(card))]
    assert ("dtype" in found) is refused
    assert "dtype" not in [problem.where for problem in preflight.family_problems(RunConfig(dtype="float32"), spec, find_card(card))]

"""Out of memory in spite of all: the same rows in halves, the same result, and nothing of the failed attempt left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine import meter
from qlora_tui.engine.batches import Blocks
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Evaluated, Finding, Saved, Stepped
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import step

Make = Callable[..., RunConfig]
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB"


def adapter(ran: Ran) -> dict[str, torch.Tensor]:
    return load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def memory(ran: Ran) -> list[Finding]:
    return [finding for finding in ran.of(Finding) if finding.detector == "memory"]


class Card:
    """A device on which more than `most` rows at once, from the given pass on, are too many; evaluation and training counted apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, *, training: bool = True, after: int = 0) -> None:
        self.most, self.training, self.after = most, training, after
        self.passes: list[int] = []
        self.failed: list[weakref.ref[torch.Tensor]] = []
        self.alive_at_retry: list[int] = []
        real = Loaded.hidden

        def hidden(loaded: Loaded, ids: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
            if torch.is_grad_enabled() != self.training:
                return real(loaded, ids, blocks)
            rows = len(ids) if blocks is None else len(blocks.bounds) - 1
            self.alive_at_retry.append(sum(tensor() is not None for tensor in self.failed))
            self.passes.append(rows)
            states = real(loaded, ids, blocks)
            if rows > self.most and len(self.passes) > self.after:
                self.failed.append(weakref.ref(states))
                raise torch.OutOfMemoryError(SAID)
            return states

        monkeypatch.setattr(Loaded, "hidden", hidden)


FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(("most", "smaller", "halvings"), [(2, TWO, 1), (1, ONE, 2)])
def test_the_run_is_to_the_bit_the_run_at_the_smaller_size(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, smaller: dict[str, int], halvings: int
) -> None:
    expected = drive(run_of(**smaller, eval_steps=100), tmp_path / "smaller")
    Card(monkeypatch, most)
    ran = drive(run_of(**FOUR, eval_steps=100), tmp_path / "run")
    assert ran.error is None
    assert ran.losses == expected.losses
    assert same_bits(adapter(ran), adapter(expected))
    assert [finding.numbers["rows_at_once"] for finding in memory(ran)] == [2, 1][:halvings]
    assert {finding.severity for finding in memory(ran)} == {"warn"}
    assert [len(event.rows) for event in ran.of(Stepped)] == [4] * 6


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_whenever_memory_runs_out_the_loss_stays(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Two micro-batches a step: an odd k is the first of a step, an even one the second, with half the gradient already there."""
    run = run_of(**TWO, eval_steps=100)
    whole = drive(run, tmp_path / "whole")
    card = Card(monkeypatch, 1, after=k - 1)
    ran = drive(run, tmp_path / "run")
    assert len(memory(ran)) == 1
    assert card.passes[k:] == [1] * len(card.passes[k:])
    assert ran.losses == pytest.approx(whole.losses, abs=2e-6)
    assert [event.rows for event in ran.of(Stepped)] == [event.rows for event in whole.of(Stepped)]
    for name, part in adapter(whole).items():
        torch.testing.assert_close(adapter(ran)[name], part, rtol=1e-3, atol=1e-4)


def test_random_numbers_are_those_of_the_first_attempt(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = drive(run_of(**TWO, lora_dropout=0.2), tmp_path / "smaller")
    Card(monkeypatch, 2)
    ran = drive(run_of(**FOUR, lora_dropout=0.2), tmp_path / "run")
    assert len(memory(ran)) == 1
    assert ran.losses == expected.losses


def test_nothing_of_a_failed_attempt_is_alive_when_the_next_begins(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 1)
    ran = drive(run_of(**FOUR, gradient_checkpointing="1"), tmp_path / "run")
    assert ran.error is None
    assert len(card.failed) == 2
    assert set(card.alive_at_retry) == {0}


def test_it_is_halved_three_times_and_no_more(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(per_device_train_batch_size=16, gradient_accumulation_steps=1, max_steps=2)
    Card(monkeypatch, 1)
    ran = drive(run, tmp_path / "run")
    assert isinstance(ran.error, WontFit)
    assert [finding.numbers["rows_at_once"] for finding in memory(ran)] == [8, 4, 2]
    assert "after 3 halvings" in str(ran.error)


def test_one_row_that_does_not_fit_ends_the_run_with_fixes_and_what_was_trained(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(**ONE, save_steps=100, gradient_checkpointing="false")
    Card(monkeypatch, 0, after=9)
    ran = drive(run, tmp_path / "run")
    assert isinstance(ran.error, WontFit)
    assert "--set gradient_checkpointing=true" in str(ran.error)
    assert [event.step for event in ran.of(Saved)] == [2]
    monkeypatch.undo()
    rest = drive(run, tmp_path / "run", resume=True)
    assert same_bits(adapter(rest), adapter(drive(run, tmp_path / "whole")))


def test_a_resume_goes_on_at_the_smaller_size(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(**FOUR)
    with monkeypatch.context() as patch:
        Card(patch, 2, after=1)
        whole = drive(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Card(patch, 2, after=1)
        drive(run, tmp_path / "part", Asked({3: "stop"}))
    rest = drive(run, tmp_path / "part", resume=True)
    assert same_bits(adapter(rest), adapter(whole))


def test_an_evaluation_is_halved_on_its_own(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(**FOUR, eval_steps=3)
    whole = drive(run, tmp_path / "whole")
    card = Card(monkeypatch, 1, training=False)
    ran = drive(run, tmp_path / "run")
    assert [finding.numbers["rows_at_once"] for finding in memory(ran)] == [2, 1]
    assert "evaluation" in memory(ran)[0].message
    assert set(card.alive_at_retry) == {0}
    assert same_bits(adapter(ran), adapter(whole))
    assert [event.loss for event in ran.of(Evaluated)] == pytest.approx([event.loss for event in whole.of(Evaluated)], rel=1e-6)
    assert [event.rows for event in ran.of(Evaluated)] == [4, 4, 4]


def test_an_evaluation_of_one_row_that_does_not_fit_is_refused(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, 0, training=False, after=1)  # the first pass without gradients is the loader's own check
    ran = drive(run_of(**FOUR), tmp_path / "run")
    assert isinstance(ran.error, WontFit)
    assert "evaluation" in str(ran.error)


def test_another_fault_is_not_taken_for_a_lack_of_memory(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(step, "token_losses", broken)
    ran = drive(run_of(), tmp_path / "run")
    assert str(ran.error) == "a kernel failed"
    assert memory(ran) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert meter.out_of_memory(error) is expected


def test_an_allocator_that_starts_over_again_and_again_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, 1, 1, 2, 3, 4, 5])
    monkeypatch.setattr(step, "allocator_retries", lambda: next(counts))
    monkeypatch.setattr(step, "in_use", lambda device: {})
    thrash = step.Thrash(torch.device("cuda"))
    found = [thrash.see(number) for number in range(1, 8)]
    assert [len(findings) for findings in found] == [0, 0, 0, 0, 1, 0, 0]
    assert "emptied" in found[4][0].message or "empty its cache 3 times" in found[4][0].message
    assert step.Thrash(torch.device("cpu")).see(1) == []


def test_a_chunk_of_the_loss_changes_rounding_at_most(run_of: Make, tmp_path: Path) -> None:
    whole = drive(run_of(max_steps=4), tmp_path / "whole")
    small = drive(run_of(max_steps=4, loss_chunk_size=7), tmp_path / "small")
    assert small.losses == pytest.approx(whole.losses, abs=2e-6)

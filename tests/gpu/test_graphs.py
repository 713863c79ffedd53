"""Batches recorded as CUDA graphs: the same steps as without, through evaluations, checkpoints and whatever cannot be recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, Ran, drive

from qlora_tui.engine.events import Evaluated, Finding, Planned, Stepped
from qlora_tui.engine.fast import graphs
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig, from_values

pytestmark = pytest.mark.gpu
Make = Callable[..., RunConfig]


@pytest.fixture
def run_of(tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> Make:
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    write_tokenizer(tmp_path / "model")
    data = write_jsonl(chat_rows)

    def make(**values: Any) -> RunConfig:
        usual = {
            "model_name_or_path": str(tmp_path / "model"),
            "data": (str(data),),
            "max_length": 256,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "learning_rate": 2e-3,
            "eval_steps": 4,
            "gradient_checkpointing": "1",
        }
        return from_values({**usual, **values})

    return make


def on_gpu(run: RunConfig, folder: Path, asked: Asked | None = None, *, resume: bool = False) -> Ran:
    return drive(run, folder, asked, resume=resume, machine=look())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Shape]:
    shapes, real = list[graphs.Shape](), graphs.Graphs._record

    def record(self: graphs.Graphs, shape: graphs.Shape) -> Any:
        shapes.append(shape)
        return real(self, shape)

    monkeypatch.setattr(graphs.Graphs, "_record", record)
    return shapes


def test_recorded_steps_are_the_plain_ones(run_of: Make, tmp_path: Path, recorded: list[graphs.Shape]) -> None:
    plain = on_gpu(run_of(cuda_graphs="off"), tmp_path / "plain")
    assert plain.error is None
    assert not recorded
    again = on_gpu(run_of(cuda_graphs="off"), tmp_path / "again")
    noise = max(abs(a - b) for a, b in zip(plain.losses, again.losses, strict=True))
    replayed = on_gpu(run_of(cuda_graphs="on"), tmp_path / "replayed")
    assert replayed.error is None
    assert len(set(recorded)) == len(recorded) > 1  # rows differ in length; each shape once, also after evaluations
    assert replayed.losses == pytest.approx(plain.losses, abs=max(4 * noise, 2e-2))
    assert [e.loss for e in replayed.of(Evaluated)] == pytest.approx([e.loss for e in plain.of(Evaluated)], abs=max(4 * noise, 2e-2))
    assert not [found for found in replayed.of(Finding) if found.detector == "graphs"]


@pytest.mark.parametrize("values", [{}, {"packing": "on"}, {"attn_implementation": "eager"}], ids=str)
def test_attention_with_capped_scores_is_recorded_too(
    run_of: Make, tmp_path: Path, recorded: list[graphs.Shape], values: dict[str, Any]
) -> None:
    """Evaluations in between find tiles of their own, in the memory that recorded batches use."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 264, "sliding_window": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**size, **heads, bos_token_id=256, eos_token_id=258)).save_pretrained(tmp_path / "model")
    ways = {
        name: on_gpu(run_of(**values, cuda_graphs=how), tmp_path / name) for name, how in (("off", "off"), ("again", "off"), ("on", "on"))
    }
    assert [ran.error for ran in ways.values()] == [None] * 3
    assert recorded
    assert not [found for found in ways["on"].of(Finding) if found.detector == "graphs"]
    noise = max(abs(a - b) for a, b in zip(ways["off"].losses, ways["again"].losses, strict=True))
    assert ways["on"].losses == pytest.approx(ways["off"].losses, abs=max(4 * noise, 2e-2))
    measured = [[event.loss for event in ways[name].of(Evaluated)] for name in ("off", "on")]
    assert measured[1] == pytest.approx(measured[0], abs=max(4 * noise, 2e-2))


def test_a_stop_and_a_resume_change_nothing(run_of: Make, tmp_path: Path) -> None:
    run = run_of(cuda_graphs="on")
    whole, again = on_gpu(run, tmp_path / "whole"), on_gpu(run, tmp_path / "again")
    noise = max(abs(a - b) for a, b in zip(whole.losses, again.losses, strict=True))
    part = on_gpu(run, tmp_path / "part", Asked({5: "stop"}))
    rest = on_gpu(run, tmp_path / "part", resume=True)
    gap = max(abs(a - b) for a, b in zip(whole.losses, part.losses + rest.losses, strict=True))
    assert gap <= max(4 * noise, 5e-3)


def test_what_cannot_be_recorded_goes_the_plain_way_and_says_so(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = graphs.Graphs.__init__

    def init(self: graphs.Graphs, module: Any, parameters: Any, losses: Any, lengths: Any, *, longest: int) -> None:
        def waits(*given: Any) -> torch.Tensor:
            found: torch.Tensor = losses(*given)
            return found * float(found.detach().sum() > -1)  # the host asks for a number: no graph can hold that

        real(self, module, parameters, waits, lengths, longest=longest)

    monkeypatch.setattr(graphs.Graphs, "__init__", init)
    ran = on_gpu(run_of(cuda_graphs="on"), tmp_path / "run")
    plain = on_gpu(run_of(cuda_graphs="off"), tmp_path / "plain")
    assert ran.error is None
    (told,) = [found for found in ran.of(Finding) if found.detector == "graphs"]
    assert "cannot be recorded" in told.message
    assert ran.losses == pytest.approx(plain.losses, abs=2e-2)


def test_memory_of_recorded_batches_is_lent_to_an_evaluation(run_of: Make, tmp_path: Path) -> None:
    ran = on_gpu(run_of(cuda_graphs="on", eval_steps=2), tmp_path / "run")
    reserved = [step.memory_reserved_bytes for step in ran.of(Stepped)]
    assert max(reserved[4:]) <= max(reserved[:4])  # nothing grows with evaluations


def test_the_planner_records_where_launches_take_longer(run_of: Make, tmp_path: Path) -> None:
    ran = on_gpu(run_of(), tmp_path / "run")
    assert ran.of(Planned)[-1].choices["cuda_graphs"] == "on"
    assert ran.losses[-1] < ran.losses[0] - 0.5

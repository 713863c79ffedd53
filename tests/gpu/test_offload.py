"""Inputs of recomputed layers in pinned RAM, on a CUDA device: the same bits as without, whatever the streams do meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, drive

from qlora_tui.engine.events import Finding, Phase, Stepped, Wish
from qlora_tui.engine.fast.offload import CudaStreams, Lane, Offload, streams_of
from qlora_tui.engine.fast.recompute import recompute
from qlora_tui.engine.load import Loaded, load
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import from_values

pytestmark = pytest.mark.gpu
LAYERS = 6


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    write_model(tmp_path, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=LAYERS)
    write_tokenizer(tmp_path)
    run = from_values({"model_name_or_path": str(tmp_path), "data": ("x",), "gradient_checkpointing": "true", "lora_r": 8})
    found = load(run, tmp_path, look())
    for name, parameter in found.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.02)
    return found


def gradients(loaded: Loaded, length: int) -> list[torch.Tensor]:
    for parameter in loaded.model.parameters():
        parameter.grad = None
    ids = torch.arange(2 * length, device="cuda").reshape(2, length) % 97
    (loaded.hidden(ids).float() ** 2).mean().backward()
    return [part.grad.clone() for part in loaded.model.parameters() if part.grad is not None]


def test_gradients_are_the_same_bits_over_batches_of_many_lengths(loaded: Loaded) -> None:
    """Of those that two runs without it agree on: attention's backward pass may add in another order each time."""
    layers: Any = loaded.decoder.layers
    lengths = (1500, 64, 2000, 700, 2000, 33)
    kept = [gradients(loaded, length) for length in lengths]
    again = [gradients(loaded, length) for length in lengths]
    offload = Offload(streams_of(loaded.device))
    recompute(layers, LAYERS, dropout=False, offload=offload)
    away = [gradients(loaded, length) for length in lengths]
    assert offload.lent == 0
    assert offload.held_bytes >= (LAYERS - 2) * 2 * 2000 * 512 * 2
    for left, same, right in zip(kept, again, away, strict=True):
        for one, other, moved in zip(left, same, right, strict=True):
            noise = (one - other).abs().max()
            assert (one - moved).abs().max() <= 4 * noise
    offload.release()
    assert offload.held_bytes == 0


class Slow(CudaStreams):
    """Copies that begin some ten milliseconds late, into memory that is no number until then."""

    def copy(self, lane: Any, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_cuda:
            target.fill_(torch.nan)
            lane.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(lane):
            torch.cuda._sleep(20_000_000)
        super().copy(lane, target, source)


class Deaf:
    """The stream that computes, waiting for nobody."""

    def __init__(self, stream: Lane) -> None:
        self.record_event = stream.record_event

    def wait_event(self, event: Any) -> None:
        pass


class Racing(Slow):
    """The mutant: what computes does not wait for copies."""

    def current(self) -> Lane:
        return Deaf(super().current())


def test_late_copies_change_nothing_and_without_events_they_would(loaded: Loaded) -> None:
    layers: Any = loaded.decoder.layers
    kept, again = gradients(loaded, 1500), gradients(loaded, 1500)
    noise = [(one - other).abs().max() for one, other in zip(kept, again, strict=True)]

    def off(streams: CudaStreams) -> list[bool]:
        recompute(layers, LAYERS, dropout=False, offload=Offload(streams))
        found = gradients(loaded, 1500)
        torch.cuda.synchronize()
        return [not bool((one - moved).abs().max() <= 4 * most) for one, moved, most in zip(kept, found, noise, strict=True)]

    assert not any(off(Slow(loaded.device)))
    assert any(off(Racing(loaded.device)))


def test_ram_that_is_not_pinned_is_out_of_memory_and_leaves_the_card_well(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = CudaStreams(loaded.device)
    first = streams.buffer(1 << 20)
    real = torch.cuda.cudart()

    def taken(place: int, size: int, flags: int) -> Any:
        return real.cudaHostRegister(first.bytes.data_ptr(), size, flags)  # pinned already: a real refusal

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaError=real.cudaError, cudaHostRegister=taken))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        streams.buffer(1 << 20)
    monkeypatch.undo()
    assert float(torch.ones(8, device="cuda").sum()) == 8  # CUDA remembers its last fault until somebody asks


def test_the_card_holds_less(loaded: Loaded) -> None:
    layers: Any = loaded.decoder.layers

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        gradients(loaded, 8192)
        return torch.cuda.max_memory_allocated()

    peak()
    before = peak()
    recompute(layers, LAYERS, dropout=False, offload=Offload(streams_of(loaded.device)))
    assert before - peak() > (LAYERS - 4) * 2 * 8192 * 512 * 2


@dataclass
class Paused(Asked):
    """Asks for a pause after eight steps, and to go on at the next look."""

    left: list[str] = field(default_factory=lambda: ["pause", "resume"])

    def take(self) -> list[Wish]:
        return [Wish(self.left[0], 0.0, 1, self.left.pop(0), {})] if self.steps >= 8 and self.left else super().take()


@pytest.mark.parametrize("packing", ["off", "on"])
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_run_trains_with_its_inputs_away(
    tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], graphs: str, packing: str
) -> None:
    """With recorded batches the copies are part of the recording, for rows of many lengths, through a pause and evaluations."""
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_model(tmp_path / "model", **size, num_hidden_layers=LAYERS)
    write_tokenizer(tmp_path / "model")
    values = {"model_name_or_path": str(tmp_path / "model"), "data": (str(write_jsonl(chat_rows)),), "max_length": 256, "max_steps": 20}
    values |= {"gradient_checkpointing": "true", "learning_rate": 1e-3, "num_train_epochs": 20.0, "eval_steps": 5}
    values |= {"cuda_graphs": graphs, "packing": packing, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    curves = []
    for way in ("off", "on"):
        asked = Paused() if way == "on" else None
        ran = drive(from_values({**values, "offload_checkpoints": way}), tmp_path / way, asked, machine=look())
        assert ran.error is None
        assert len([end for end in ran.of(Phase) if end.name == "pause" and end.state == "end"]) == (way == "on")
        assert not [found for found in ran.of(Finding) if found.detector == "graphs"]
        curves.append(torch.tensor([step.loss for step in ran.of(Stepped)]))
    assert (curves[0] - curves[1]).abs().max() < 0.02

"""The memory arithmetic against every tensor that the engine's own code makes: load, step and evaluation, on a processor.

The count is exact to the byte, so what the formulas miss is a fault of theirs and not of an allocator. What only
a card has (cuBLAS, kernels' own sums, cached blocks, the context) is left out on both sides.
"""

from __future__ import annotations

import array
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_kernels
import pytest
import torch
from live_bytes import LiveBytes
from torch.utils.checkpoint import checkpoint

from qlora_tui.engine import fused, models, moments
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.evaluate import measure
from qlora_tui.engine.fast.lora import _product
from qlora_tui.engine.fast.loss import Head, token_losses
from qlora_tui.engine.load import Loaded, load, trainable
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import build_optimizer, flatten
from qlora_tui.engine.train.step import Gradient, Halving, Thrash

CPU = Machine("cpu", "cpu", 1 << 34, cores=1)
UNSEEN = ("kernels", "allocator", "context")
WORDS = 512
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": WORDS,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL, NONE = "true", "false"


def settings(kind: str, layers: int, rows: int, length: int, checkpointing: str, **changes: Any) -> Any:
    name = f"{kind} {rows}x{length} {checkpointing} " + " ".join(f"{key}={value}" for key, value in changes.items())
    return pytest.param(kind, layers, rows, length, {"gradient_checkpointing": checkpointing, **changes}, id=name.strip())


GRID = [
    *(settings(kind, 5, 2, 128, checkpointing) for kind in ("llama", "qwen3", "phi3", "gemma3_text") for checkpointing in (ALL, "2", NONE)),
    settings("olmo2", 4, 2, 128, ALL),
    settings("granite", 4, 2, 128, "3"),
    settings("gemma2", 4, 2, 128, ALL, attn_implementation="eager"),
    settings("gemma2", 4, 2, 128, NONE, attn_implementation="eager"),
    settings("llama", 4, 1, 256, ALL, attn_implementation="eager"),
    settings("qwen3", 4, 1, 256, NONE, attn_implementation="eager"),
    settings("mistral", 4, 2, 128, ALL, sliding_window=64),
    settings("gemma3_text", 7, 2, 128, NONE, sliding_window=64),
    settings("qwen2", 4, 8, 32, ALL, lora_r=4),
    settings("qwen2", 4, 1, 384, NONE, lora_r=64),
    settings("llama", 4, 2, 128, ALL, method="lora"),
    settings("llama", 4, 2, 128, NONE, method="lora", dtype="float32"),
    settings("qwen3", 4, 1, 64, ALL, lora_r=64, gradient_accumulation_steps=1),
    settings("qwen3", 6, 1, 64, "3", lora_r=64, gradient_accumulation_steps=1),
    settings("llama", 4, 2, 128, ALL, use_dora=True),
    settings("llama", 4, 2, 128, NONE, use_dora=True),
    settings("llama", 4, 2, 128, ALL, lora_dropout=0.1),
    settings("llama", 4, 2, 128, NONE, lora_dropout=0.1),
    settings("llama", 4, 1, 96, ALL, lora_r=4),
    settings("llama", 4, 1, 64, ALL, lora_r=4, lora_dropout=0.1),
    settings("llama", 4, 2, 128, ALL, init_lora_weights="pissa", method="lora"),
    settings("llama", 4, 2, 128, NONE, lora_target_modules=("gate_proj", "up_proj")),
    settings("llama", 4, 2, 128, "2", lora_target_modules=("q_proj", "v_proj")),
    settings("llama", 4, 2, 128, ALL, method="lora-8bit"),
    settings("qwen2", 4, 2, 128, NONE, method="lora-8bit"),
    settings("qwen3", 4, 4, 128, ALL, loss_chunk_size=64),
    settings("qwen3", 4, 2, 128, NONE, bnb_4bit_use_double_quant=False),
]
"""Families, checkpointing none, some and all, rows, lengths, ranks, both bases, every kind of adapter."""


def write(folder: Path, kind: str, layers: int, **shape: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    usual = {"sliding_window": None} if kind == "mistral" else {}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **{**SHAPE, **usual, **shape})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def held(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that lives as long as the model: weights, constants of 4-bit ones, what adapters started from."""
    for module in model.modules():
        for part in (*module._parameters.values(), *module._buffers.values()):
            if part is None:
                continue
            yield part.data
            state = part.quant_state if hasattr(part, "quant_state") else None
            if state is not None:
                yield from (state.absmax, state.code)
                yield from (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        forward = vars(module).get("forward")
        if forward is not None and hasattr(forward, "start"):
            yield from forward.start or ()
            yield from () if forward._squares is None else (forward._squares,)


def rows_of(number: int, length: int) -> list[TokenRow]:
    ids = torch.randint(3, WORDS, (number, length)).tolist()
    return [TokenRow(row, array.array("i", part), bytes([1] * length)) for row, part in enumerate(ids)]


def seen(items: tuple[moments.Item, ...], *without: str) -> int:
    return sum(item.bytes for item in items if item.name not in (*UNSEEN, *without))


def make(folder: Path, kind: str, layers: int, rows: int, length: int, changes: dict[str, Any]) -> tuple[RunConfig, moments.Moments]:
    window = {"sliding_window": changes.pop("sliding_window")} if "sliding_window" in changes else {}
    write(folder, kind, layers, **window)
    usual = {"dtype": "bfloat16", "optim": "adamw_torch", "gradient_accumulation_steps": 2, "lora_r": 16}
    run = RunConfig(model_name_or_path=str(folder), max_length=length, per_device_train_batch_size=rows, **(usual | changes))
    return run, moments.Moments(models.from_folder(folder), run, CPU, None)


def train_peak(run: RunConfig, loaded: Loaded, rows: int, length: int) -> int:
    """The peak of a second optimizer step, through the engine's own gradient and optimizer."""
    loaded.model.train()
    flat = flatten(run, trainable(loaded.model), loaded.device)
    optimizer = build_optimizer(run, flat, loaded.device)

    def refuse(said: str) -> Any:
        raise AssertionError(said)

    gradient = Gradient(loaded, flat, Halving("a test", rows, loaded.device, refuse), run.loss_chunk_size, Thrash(loaded.device))
    with LiveBytes(held(loaded.model)) as live:
        for _ in range(2):
            live.reset()
            step = rows_of(rows * run.gradient_accumulation_steps, length)
            gradient.add(step, length * len(step))
            optimizer.step()
            gradient.clear()
    return live.peak


@pytest.mark.parametrize(("kind", "layers", "rows", "length", "changes"), GRID)
def test_a_step_takes_what_the_formulas_say(
    tmp_path: Path, kind: str, layers: int, rows: int, length: int, changes: dict[str, Any]
) -> None:
    run, parts = make(tmp_path, kind, layers, rows, length, dict(changes))
    measured = train_peak(run, load(run, tmp_path, CPU), rows, length)
    predicted = max(seen(items) for items in parts.training())
    assert predicted == pytest.approx(measured, rel=0.012)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("phi3", {"method": "lora"}),
        ("gemma3_text", {}),
        ("gemma2", {"attn_implementation": "eager"}),
        ("llama", {"dtype": "float32", "loss_chunk_size": 64}),
        ("llama", {"method": "lora-8bit"}),
    ],
    ids=["llama", "phi3 in 16 bits", "gemma3", "gemma2", "llama in 32 bits, small chunks", "llama in 8 bits"],
)
def test_loading_and_measuring_take_what_the_formulas_say(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    run, parts = make(tmp_path, kind, 4, 2, 256, dict(changes))
    gc.collect()
    with LiveBytes() as arriving:
        loaded = load(run, tmp_path, CPU)
    assert seen(parts.loading()) == pytest.approx(arriving.peak, rel=0.05)
    loaded.model.eval()
    with LiveBytes(held(loaded.model)) as live:
        list(measure(loaded, rows_of(2, 256), 2, lambda: None))
    predicted = max(seen(items, "optimizer") for items in parts.evaluating())
    assert predicted == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize(("softcap", "most"), [(None, 1), (3.0, 2)], ids=["plain", "capped"])
def test_no_more_than_one_chunk_of_logits_is_alive(softcap: float | None, most: int) -> None:
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(WORDS, 4)
    with LiveBytes([hidden, weight]) as live:
        token_losses(hidden, Head(weight, softcap=softcap), torch.arange(64), 16)
    assert live.peak - live.held < (most + 0.2) * 16 * WORDS * 4


def test_a_loss_that_goes_back_twice_raises_and_is_never_wrong() -> None:
    hidden = torch.randn(8, 4, requires_grad=True)
    losses = token_losses(hidden, Head(torch.randn(9, 4)), torch.arange(8))
    (losses.sum() / 8).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (losses.sum() / 8).backward()


def test_a_recomputed_input_is_gone_before_its_gradient_is_made() -> None:
    x, base = torch.randn(16, 4, requires_grad=True), torch.nn.Linear(4000, 4, bias=False).requires_grad_(False)
    a, b = torch.randn(2, 4000, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with LiveBytes([x, base.weight, a, b]) as live:
        out = checkpoint(lambda x: _product(x.repeat(1, 1000), None, base, None, a, b, None, 1.0), x, use_reentrant=False)
        out.sum().backward()
    assert live.peak - live.held < 1.4 * 16 * 4000 * 4


def test_the_tracker_counts_each_storage_once_and_until_it_is_freed() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)[3]
        second = first + 1
        del first, second
        assert live.now == 4000
        del view
        assert live.now == 0
    assert live.peak == 8000


FUSED = [
    *(
        settings(kind, 5, 2, 128, checkpointing)
        for kind in ("llama", "qwen3", "phi3", "gemma2", "gemma3_text")
        for checkpointing in (ALL, "2", NONE)
    ),
    settings("mistral", 4, 2, 128, ALL, sliding_window=64),
    settings("qwen2", 4, 8, 32, ALL, lora_r=4),
    settings("qwen2", 4, 1, 384, NONE, lora_r=64),
    settings("llama", 4, 2, 128, NONE, method="lora"),
    settings("llama", 4, 2, 128, ALL, method="lora-8bit"),
    settings("llama", 4, 2, 128, ALL, init_lora_weights="pissa", method="lora"),
    settings("llama", 4, 2, 128, NONE, lora_target_modules=("gate_proj", "up_proj")),
    settings("llama", 4, 2, 128, "2", lora_target_modules=("q_proj", "v_proj")),
    settings("qwen3", 4, 4, 128, ALL, loss_chunk_size=64),
]


@pytest.fixture
def small_tiles(fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine.fast import operations, softcap

    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(operations, "TILE", 64)
    monkeypatch.setattr(softcap, "attend", uncapped)


def uncapped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Attention that keeps what the card's capped kernel keeps: inputs, output and a sum a query, where ours for tests holds scores."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(("kind", "layers", "rows", "length", "changes"), FUSED)
def test_a_step_of_fused_layers_takes_what_the_formulas_say(
    tmp_path: Path, small_tiles: None, kind: str, layers: int, rows: int, length: int, changes: dict[str, Any]
) -> None:
    run, parts = make(tmp_path, kind, layers, rows, length, dict(changes))
    loaded = load(run, tmp_path, CPU)
    assert loaded.why_plain == ""
    assert parts.batch.fused
    measured = train_peak(run, loaded, rows, length)
    predicted = max(seen(items) for items in parts.training())
    assert predicted == pytest.approx(measured, rel=0.012)


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("checkpointing", [ALL, "2", NONE])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text"])
def test_a_step_with_gradients_in_8_bits_takes_what_the_formulas_say(
    tmp_path: Path, small_tiles: None, narrow_on_cpu: str, kind: str, checkpointing: str, length: int
) -> None:
    changes = {"gradient_checkpointing": checkpointing, "method": "lora-8bit"}
    run, parts = make(tmp_path, kind, 4, 2, length, changes)
    loaded = load(run, tmp_path, CPU)
    assert parts.batch.narrow == narrow_on_cpu
    measured = train_peak(run, loaded, 2, length)
    predicted = max(seen(items) for items in parts.training())
    assert predicted == pytest.approx(measured, rel=0.012)


@pytest.mark.parametrize("length", [32, 256])
@pytest.mark.parametrize("checkpointing", [ALL, "2", NONE])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma3_text"])
def test_a_step_of_plain_layers_with_gradients_in_8_bits_takes_what_the_formulas_say(
    tmp_path: Path, narrow_on_cpu: str, kind: str, checkpointing: str, length: int
) -> None:
    changes = {"gradient_checkpointing": checkpointing, "method": "lora-8bit", "fused_layers": "off"}
    run, parts = make(tmp_path, kind, 4, 2, length, changes)
    loaded = load(run, tmp_path, CPU)
    assert (parts.batch.narrow, parts.batch.fused, bool(loaded.why_plain)) == (narrow_on_cpu, False, True)
    measured = train_peak(run, loaded, 2, length)
    predicted = max(seen(items) for items in parts.training())
    assert predicted == pytest.approx(measured, rel=0.012)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_measuring_with_fused_layers_takes_what_the_formulas_say(tmp_path: Path, small_tiles: None, kind: str) -> None:
    check_measuring(tmp_path, kind, "qlora")


def check_measuring(tmp_path: Path, kind: str, method: str) -> None:
    run, parts = make(tmp_path, kind, 4, 2, 256, {"method": method})
    loaded = load(run, tmp_path, CPU)
    loaded.model.eval()
    with LiveBytes(held(loaded.model)) as live:
        list(measure(loaded, rows_of(2, 256), 2, lambda: None))
    predicted = max(seen(items, "optimizer") for items in parts.evaluating())
    assert predicted == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_measuring_on_an_8_bit_base_takes_what_the_formulas_say(tmp_path: Path, small_tiles: None, kind: str) -> None:
    check_measuring(tmp_path, kind, "lora-8bit")


def test_what_is_said_of_kernels_without_torch_is_what_they_are(small_tiles: None) -> None:
    from qlora_tui.engine.families import FAMILIES
    from qlora_tui.engine.fast import layers

    assert set(layers.FORMS) == {name for name, family in FAMILIES.items() if family.kernels}
    for name in ("WIDEST_ROW", "WIDEST_SUM", "ROWS_OF_A_SUM"):
        assert vars(fused)[name] == vars(plain_kernels)[name]


def test_tiles_are_as_long_as_the_budget_says() -> None:
    source = Path(fused.__file__).parent / "fast"
    assert f"TILE = {fused.TILE}\n" in (source / "operations.py").read_text()
    gate = (source / "gate.py").read_text()
    assert f"WIDEST_SUM = {fused.WIDEST_SUM}\n" in gate
    assert f"ROWS_OF_A_SUM = {fused.ROWS_OF_A_SUM}\n" in gate
    assert f"WIDEST_ROW = 1 << {fused.WIDEST_ROW.bit_length() - 1}\n" in (source / "kernels.py").read_text()

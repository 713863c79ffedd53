"""Gradients in 8 bits on a card that multiplies both kinds, and training on a base at one byte a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import drive

from qlora_tui.engine.events import Evaluated, Stepped
from qlora_tui.engine.fast import base, eightbit
from qlora_tui.engine.fast.eightbit import EightBit
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import from_values

pytestmark = pytest.mark.gpu


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.fixture
def layer() -> EightBit:
    torch.manual_seed(0)
    if "fp8" not in look().narrow:
        pytest.skip("this card multiplies no FP8")
    weight = torch.randn(1024, 2048, device="cuda") * 0.02
    weight[::100] *= 50
    return EightBit(weight.bfloat16(), None)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_rounded_numbers(layer: EightBit, kind: eightbit.Kind, dtype: torch.dtype) -> None:
    layer.narrow = kind
    x, grad = torch.randn(300, 2048, device="cuda").to(dtype), torch.randn(300, 1024, device="cuda").to(dtype)
    x[:, ::200] *= 50
    assert eightbit.narrow_gradient(layer, grad) == kind
    full = layer.weight.float() * layer.scales[:, None]
    assert torch.equal(layer.full(dtype), full.to(dtype))
    assert error(base.product(x, layer), x.float() @ full.t()) < 0.004
    assert error(base.input_gradient(grad, layer), grad.float() @ full) < 0.05
    held, scales = eightbit.quantize(grad.float() * layer.scales, kind)
    exact = (held.float() * scales[:, None]) @ layer.weight.float().to(eightbit.TYPES[kind]).float()
    assert error(base.input_gradient(grad, layer), exact) < 0.01  # what is left is the sum's own width
    assert error(base.input_gradient(grad, layer, torch.ones_like(x)), exact + 1) < 0.01


def loud(number: int, width: int) -> torch.Tensor:
    x = torch.randn(number, width, device="cuda")
    x[:, 1::50] *= 100
    x[1], x[2], x[3] = x[1] * 1000, x[2] * 1e-5, 0
    return x.bfloat16()


def same_bits(ours: eightbit.Rows, theirs: eightbit.Rows) -> bool:
    return torch.equal(ours.held.view(torch.uint8), theirs.held.view(torch.uint8)) and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("width", [96, 4096, 14_336, 28_672])
def test_kernels_write_rows_with_the_bits_of_plain_torch(layer: EightBit, width: int, kind: eightbit.Kind) -> None:
    from qlora_tui.engine.fast import widths

    x, times = loud(70, width), torch.rand(width, device="cuda") * 10
    assert same_bits(widths.quantize(x, times, kind), eightbit.quantize(x.float() * times, kind))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("shape", [(16, 16), (1024, 4096), (4096, 1040)])
def test_a_weight_is_turned_byte_by_byte(layer: EightBit, shape: tuple[int, int], kind: eightbit.Kind) -> None:
    from qlora_tui.engine.fast import widths

    weight = torch.randint(-128, 128, shape, device="cuda", dtype=torch.int8)
    assert torch.equal(
        widths.turned(weight, kind).view(torch.uint8), weight.t().float().to(eightbit.TYPES[kind]).contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("fused", ["auto", "off"])
def test_an_adapter_learns_on_it_what_it_learns_on_16_bits(
    tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], fused: str
) -> None:
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    write_tokenizer(tmp_path / "model")
    values = {"model_name_or_path": str(tmp_path / "model"), "data": (str(write_jsonl(chat_rows)),), "max_length": 256, "max_steps": 40}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "eval_steps": 20}
    curves, starts = list[torch.Tensor](), list[float]()
    for number, (method, kind) in enumerate((("lora", "fp8"), ("lora-8bit", "fp8"), ("qlora", "fp8"), ("lora-8bit", "int8"))):
        more = {"method": method, "grad_matmul": kind, "fused_layers": fused}
        ran = drive(from_values({**values, "num_train_epochs": 40.0, **more}), tmp_path / str(number), machine=look())
        assert ran.error is None
        curves.append(torch.tensor([step.loss for step in ran.of(Stepped)]))
        starts.append(ran.of(Evaluated)[0].loss)
    assert abs(starts[1] - starts[0]) < abs(starts[2] - starts[0])
    for eight in (curves[1], curves[3]):
        assert (eight - curves[0]).abs().mean() < 0.03 * curves[0].mean()
    assert not torch.equal(curves[1], curves[3])

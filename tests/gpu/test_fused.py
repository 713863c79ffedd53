"""Fused layers on a CUDA device: the real kernels in bfloat16, against their plain twins and against transformers' layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import plain_kernels
import pytest
import test_fused as on_cpu
import torch
from conftest import write_model, write_tokenizer
from loop_driver import drive
from test_fused import FAMILIES

from qlora_tui.engine.events import Phase, Stepped
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import from_values

pytestmark = pytest.mark.gpu
CLOSE: dict[str, Any] = {"rtol": 1.6e-2, "atol": 1e-2}  # a rounding of bfloat16, and of what it is made from


@pytest.fixture(autouse=True)
def on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "CPU", look())
    monkeypatch.setattr(on_cpu, "IDS", on_cpu.IDS.cuda())


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(14336, 4096), (1024, 4096), (896, 4864), (7, 192)])
def test_widened_weights_are_those_of_bitsandbytes_to_the_bit(double: bool, kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from qlora_tui.engine.fast import widths

    packed, state = bnb.quantize_4bit(made(*shape).to(dtype), compress_statistics=double, quant_type=kind)
    assert torch.equal(widths.dequantize(packed, state), bnb.dequantize_4bit(packed, state))


def test_kernels_are_their_plain_twins() -> None:
    from qlora_tui.engine.fast import gate, kernels, parts
    from qlora_tui.engine.fast.lora import Part

    torch.manual_seed(0)
    x, weight, grad = made(300, 896), made(896), made(300, 896)
    angles = torch.randn(150, 64, device="cuda")
    cos, sin = angles.cos().repeat(1, 2).bfloat16(), angles.sin().repeat(1, 2).bfloat16()
    heads, logits, labels = made(300, 14, 128), made(37, 5000), torch.randint(0, 5000, (37,), device="cuda")
    results = []
    beside = made(300, 40), made(40, 896)
    few, many = ([Part(made(300, rank + 8)[:, 8:], made(896, rank), 0.5) for _ in range(2)] for rank in (16, 40))
    begins = [(few[0], None, None), (many[1], x, weight)]
    whole, tensors = made(5000), [torch.randn(size, device="cuda") for size in (3, 1996, 1, 3000)]
    for part in (kernels, plain_kernels):
        gates, small = (gate, parts) if part is kernels else (plain_kernels, plain_kernels)
        found = [part.rms_norm(x, weight, 1e-6, 1.0, grad), part.rms_norm_backward(grad, x, weight, 1e-6, 0.0, x)]
        for kind in ("silu", "gelu_tanh"):
            for added, further in (((None, None), None), (few, (beside[0][:, :8].contiguous(), beside[1][:8])), (many, beside)):
                left, right, slope = x.clone(), grad.clone(), x.flip(0).contiguous()
                found.append(gates.gated(left, right, kind, added))
                found += gates.gated_backward_(slope, left, right, kind, added, further, product=True)
                found += [left, right, slope]
        found += [small.begun(*begin) for begin in begins] + [small.joined(tensors, torch.bfloat16)]
        sums = [tensor.clone() for tensor in tensors]
        small.add_each(whole, sums)
        found += sums
        turned, back = heads.clone(), heads.clone()
        found.append(part.turn_heads(turned, cos, sin))
        part.turn_heads_back_(back, cos, sin, heads, weight[:128], 1e-6, 1.0)
        found += [back, part.turn_heads(heads, cos, sin, weight[:128], 1e-6, 1.0)]
        changed = logits.clone()
        found += [part.cross_entropy_(changed, labels, 30.0, gradient=True), changed]
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1.6e-2, atol=1e-2 * max(1.0, float(theirs.float().abs().mean())))


@pytest.mark.parametrize("kind", FAMILIES)
def test_they_are_as_close_to_32_bits_as_transformers_layers(tmp_path: Path, kind: str) -> None:
    assert on_cpu.errors_beside_plain_layers(tmp_path, kind, gradient_checkpointing="1").max() < 1.1


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_hundred_steps_learn_what_plain_layers_learn(
    tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], graphs: str
) -> None:
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    write_tokenizer(tmp_path / "model")
    data = write_jsonl(chat_rows)
    curves = []
    for way in ("off", "auto"):
        values = {
            "model_name_or_path": str(tmp_path / "model"),
            "data": (str(data),),
            "max_length": 256,
            "max_steps": 100,
            "cuda_graphs": graphs,
        }
        values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "eval_steps": 50}
        ran = drive(from_values({**values, "num_train_epochs": 100.0, "fused_layers": way}), tmp_path / way, machine=look())
        assert ran.error is None
        assert any(phase.note == "layers are fused" for phase in ran.of(Phase)) is (way == "auto")
        curves.append(torch.tensor([step.loss for step in ran.of(Stepped)]))
    apart_by = (curves[0] - curves[1]).abs()
    assert curves[0][-10:].mean() < curves[0][:10].mean() - 0.5
    assert apart_by.mean() < 0.02 * curves[0].mean()
    assert apart_by.max() < 0.2

"""The Triton kernels against plain torch, in Triton's interpreter: any machine, any processor.

The interpreter cuts numbers off where a card rounds them to bfloat16, so types are float32 and float16 here; tests/gpu/test_fused.py
has bfloat16.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import plain_kernels
import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture
def kernels() -> ModuleType:
    """The real ones; where a card is, tests/gpu has them on it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a card")
    return importlib.import_module("qlora_tui.engine.fast.kernels")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(48, 128), (7, 192)])
def test_widened_weights_are_those_of_bitsandbytes_to_the_bit(
    kernels: ModuleType, double: bool, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(shape).to(dtype), compress_statistics=double, quant_type=kind)
    assert torch.equal(kernels.dequantize(packed, state), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [96, 128])
def test_norm(kernels: ModuleType, offset: float, beside: bool, width: int) -> None:
    x, weight, grad = torch.randn(5, width), torch.randn(width), torch.randn(5, width)
    other = torch.randn(5, width) if beside else None
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5, offset, other), plain_kernels.rms_norm(x, weight, 1e-5, offset, other), **CLOSE
    )
    ours, theirs = (part.rms_norm_backward(grad, x, weight, 1e-5, offset, other) for part in (kernels, plain_kernels))
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "halves of one"])
def test_gate(kernels: ModuleType, kind: str, joined: bool) -> None:
    both = torch.randn(4, 2 * 1030) * 4
    grad = torch.randn(4, 1030)
    made = []
    for part in (kernels, plain_kernels):
        gate, up = both.clone().chunk(2, dim=1) if joined else (half.contiguous() for half in both.clone().chunk(2, dim=1))
        product, slope = part.gated(gate, up, kind), grad.clone()
        part.gated_backward_(slope, gate, up, kind)
        torch.testing.assert_close(slope, product, **CLOSE)  # the gradient's place holds the product
        made.append((product, gate, up))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(("size", "turned"), [(24, 24), (24, 16), (64, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads(kernels: ModuleType, size: int, turned: int, normed: bool) -> None:
    if normed and turned != size:
        pytest.skip("no family norms a head of which it turns a part")
    angles = torch.randn(3, turned // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    norm = (torch.randn(size), 1e-6, 1.0) if normed else (None, 0.0, 0.0)
    x, grad = torch.randn(6, 3, size), torch.randn(6, 3, size)
    made = []
    for part in (kernels, plain_kernels):
        given, slope = x.clone(), grad.clone()
        out = part.turn_heads(given, cos, sin, *norm)
        assert (out.data_ptr() == given.data_ptr()) is not normed
        part.turn_heads_back_(slope, cos, sin, x if normed else None, *norm)
        made.append((out, slope))
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_heads_of_a_tensor_that_holds_more(kernels: ModuleType) -> None:
    whole = torch.randn(4, 5 * 8)
    angles = torch.randn(4, 4).repeat(1, 2)
    expected = whole.clone()
    expected[:, :16] = plain_kernels.turn_heads(whole[:, :16].reshape(4, 2, 8).clone(), angles.cos(), angles.sin()).flatten(1)
    kernels.turn_heads(whole[:, :16].unflatten(1, (2, 8)), angles.cos(), angles.sin())
    torch.testing.assert_close(whole, expected, **CLOSE)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("words", [300, 9000], ids=["one tile", "several tiles"])
def test_loss(kernels: ModuleType, softcap: float | None, gradient: bool, words: int) -> None:
    logits, labels = torch.randn(4, words) * 5, torch.randint(0, words, (4,))
    ours, theirs = logits.clone(), logits.clone()
    losses = kernels.cross_entropy_(ours, labels, softcap, gradient=gradient)
    torch.testing.assert_close(losses, plain_kernels.cross_entropy_(theirs, labels, softcap, gradient=gradient), **CLOSE)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(ours, logits) is not gradient


def test_no_tokens_have_no_losses(kernels: ModuleType) -> None:
    assert kernels.cross_entropy_(torch.empty(0, 9), torch.empty(0, dtype=torch.long), None, gradient=True).shape == (0,)

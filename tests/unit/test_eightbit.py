"""An 8-bit base: what quantization loses, what products make of it, and how it is read."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.engine import sizes
from qlora_tui.engine.fast import base, eightbit
from qlora_tui.engine.fast.eightbit import EightBit, quantize


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["fp8", "int8"]), rows=st.integers(1, 5), size=st.floats(1e-6, 1e20), zero=st.booleans())
def test_a_row_is_off_by_its_own_largest_number_at_most(kind, rows, size, zero):
    torch.manual_seed(rows)
    weight = torch.randn(rows, 48) * torch.logspace(-3, 3, rows)[:, None] * size
    weight[0] *= not zero
    held, scales = quantize(weight, kind)
    found = held.float() * scales[:, None]
    largest = weight.abs().amax(1, keepdim=True)
    step = 1 / 254 if kind == "int8" else 1 / 28  # half of INT8's even step; FP8's widest is 32 of 448, rounded by half
    assert bool(((found - weight).abs() <= largest * step * 1.001 + 1e-30).all())
    assert bool((found[0] == 0).all()) or not zero


def test_it_is_far_closer_to_the_original_than_four_bits():
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512) * 0.02, torch.randn(64, 512)
    layer = EightBit(weight, None)
    assert error(layer(x), x @ weight.t()) < 0.12 * error(x @ four_bits(weight).t(), x @ weight.t())


def test_loud_rows_blur_nobody_else():
    torch.manual_seed(0)
    weight = torch.randn(256, 512) * 0.02
    weight[::50] *= 100
    others = torch.ones(256, dtype=torch.bool)
    others[::50] = False
    layer, x = EightBit(weight, None), torch.randn(64, 512)
    assert error(layer(x)[:, others], (x @ weight.t())[:, others]) < 0.01


@pytest.mark.parametrize(("kind", "faint"), [("fp8", 0.08), ("int8", 0.15)])
def test_gradients_in_8_bits_cost_less_than_four_bits_whatever_is_loud(kind, faint):
    torch.manual_seed(0)
    weight, grad = torch.randn(256, 512) * 0.02, torch.randn(64, 256).bfloat16()
    weight[::50] *= 100
    grad[:, ::100] *= 100
    grad[3] *= 1e-5
    layer = EightBit(weight, None)
    right = grad.float() @ weight
    assert not eightbit.narrow_gradient(layer, grad)
    layer.narrow = kind
    assert not eightbit.narrow_gradient(layer, grad.float())
    assert eightbit.narrow_gradient(layer, grad) == kind
    found, four = base.input_gradient(grad, layer), grad.float() @ four_bits(weight)
    assert error(found, right) < 0.6 * error(four, right)
    assert error(found[3], right[3]) < faint  # a faint token has its own scale
    into = torch.ones(64, 512, dtype=torch.bfloat16)
    assert error(base.input_gradient(grad, layer, into), right + 1) < 0.06


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_widened_weight(bias):
    torch.manual_seed(0)
    layer = EightBit(torch.randn(24, 40), torch.randn(24) if bias else None)
    x, grad, added = torch.randn(6, 40), torch.randn(6, 24), torch.randn(6, 24)
    full = base.full_weight(layer, torch.float32)
    assert torch.allclose(full, layer.weight.float() * layer.scales[:, None])
    plain = x @ full.t() + (layer.bias if bias else 0)
    assert torch.allclose(base.product(x, layer), plain, atol=1e-5)
    assert torch.allclose(base.product(x, layer, added, torch.empty(6, 24)), plain + added, atol=1e-5)
    assert torch.allclose(base.input_gradient(grad, layer), grad @ full, atol=1e-5)
    assert torch.allclose(base.input_gradient(grad, layer, torch.ones(6, 40)), grad @ full + 1, atol=1e-5)


def test_the_piece_in_32_bits_is_as_large_as_the_budget_says(monkeypatch):
    assert eightbit._PIECE == sizes.EIGHT_BIT_PIECE
    layer = EightBit(torch.randn(10, 8), None)
    whole = layer.full(torch.bfloat16)
    monkeypatch.setattr(eightbit, "_PIECE", 24)
    assert torch.equal(layer.full(torch.bfloat16), whole)

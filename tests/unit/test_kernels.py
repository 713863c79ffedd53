"""The Triton kernels against plain torch, in Triton's interpreter: any machine, any processor.

The interpreter cuts numbers off where a card rounds them to bfloat16, so types are float32 and float16 here; tests/gpu/test_fused.py
has bfloat16. When it rounds to FP8 it loses the carry, so that 1.97 becomes 1: torch rounds in its place here, and a card itself in
tests/gpu/test_eightbit.py.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import plain_kernels
import pytest
import torch

from qlora_tui.engine.fast import eightbit
from qlora_tui.engine.fast.lora import Part

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture
def kernels() -> ModuleType:
    """The real ones; where a card is, tests/gpu has them on it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a card")
    return importlib.import_module("qlora_tui.engine.fast.kernels")


@pytest.fixture
def gate(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("qlora_tui.engine.fast.gate")


@pytest.fixture
def parts(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("qlora_tui.engine.fast.parts")


@pytest.fixture
def widths(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("qlora_tui.engine.fast.widths")


@pytest.fixture
def fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers become FP8 as torch rounds them."""
    from triton.runtime import interpreter

    rounded = interpreter._convert_float

    def convert(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name != "fp8e4nv":
            return rounded(numbers, source, target, mode)
        assert numbers.dtype == np.float32
        return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(48, 128), (7, 192), (3, 100), (5, 4096)])
def test_widened_weights_are_those_of_bitsandbytes_to_the_bit(
    widths: ModuleType, double: bool, kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(shape).to(dtype), compress_statistics=double, quant_type=kind)
    assert torch.equal(widths.dequantize(packed, state), bnb.dequantize_4bit(packed, state))


def loud(number: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows with what real activations have: a loud channel, a loud and a faint token, and one of zeros."""
    x = torch.randn(number, width)
    x[:, 1::50] *= 100
    x[1] *= 100
    x[2] *= 1e-5
    x[3] = 0
    return x.to(dtype)


def same_bits(ours: eightbit.Rows, theirs: eightbit.Rows) -> bool:
    return torch.equal(ours.held.view(torch.uint8), theirs.held.view(torch.uint8)) and torch.equal(ours.scales, theirs.scales)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("width", [48, 20_000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_a_row_that_is_not_finite_stays_so_in_8_bits(widths: ModuleType, fp8: None, kind: eightbit.Kind, width: int, bad: float) -> None:
    x = torch.ones(3, width)
    x[1, 7] = bad
    for held, scales in (widths.quantize(x, torch.ones(width), kind), eightbit.quantize(x, kind)):
        found = (held.float() * scales[:, None]).sum(1)  # as a product of it is summed and scaled
        assert found.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 96, 17000], ids=["one", "one tile", "several tiles"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_narrowed_rows_have_the_bits_of_plain_torch(
    widths: ModuleType, fp8: None, kind: eightbit.Kind, dtype: torch.dtype, width: int
) -> None:
    x = loud(6, width, dtype)
    columns = torch.rand(width) * 10
    ours = widths.quantize(x, columns, kind)
    assert same_bits(ours, plain_kernels.quantize(x, columns, kind))
    assert bool((ours.held[3].float() == 0).all())
    assert same_bits(widths.quantize(x[::2], columns, kind), plain_kernels.quantize(x[::2], columns, kind))  # rows that lie apart


@pytest.mark.parametrize("shape", [(1, 1), (130, 300), (256, 128)])
@pytest.mark.parametrize(("kind", "off"), [("fp8", 4), ("int8", 0)])
def test_a_weight_is_turned_byte_by_byte(widths: ModuleType, fp8: None, shape: tuple[int, int], kind: eightbit.Kind, off: int) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    found = widths.turned(weight, kind)
    assert found.is_contiguous()
    assert torch.equal(found.float(), plain_kernels.turned(weight, kind).float())
    assert (found.float() - weight.t()).abs().max() <= off  # of 128, in steps of 8


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (7, 5000)])
def test_whole_sums_are_scaled_and_added(widths: ModuleType, shape: tuple[int, int], added: bool) -> None:
    sums, scales = torch.randint(-(1 << 30), 1 << 30, shape, dtype=torch.int32), torch.rand(shape[0]) * 1e-6
    into = torch.randn(shape, dtype=torch.float16) if added else None
    expected = plain_kernels.summed(sums, scales, torch.float16, None if into is None else into.clone())
    found = widths.summed(sums, scales, torch.float16, into)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # a card may multiply and add in one
    assert into is None or found is into
    plain = torch.zeros(shape, dtype=torch.float16) if into is None else expected
    assert into is not None or torch.equal(eightbit.summed(sums, scales, plain), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (7, 5000)])
def test_bytes_times_the_scale_of_their_row(widths: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    held, scales = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    assert torch.equal(widths.scaled(held, scales, dtype), (held.float() * scales[:, None]).to(dtype))


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [96, 128])
def test_norm(kernels: ModuleType, offset: float, beside: bool, width: int) -> None:
    x, weight, grad = torch.randn(5, width), torch.randn(width), torch.randn(5, width)
    other = torch.randn(5, width) if beside else None
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-5, offset, other), plain_kernels.rms_norm(x, weight, 1e-5, offset, other), **CLOSE
    )
    ours, theirs = torch.empty(2, 5).unbind()
    for part, rates in ((kernels, ours), (plain_kernels, theirs)):
        part.rms_norm(x, weight, 1e-5, offset, other, rates)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours, theirs = (part.rms_norm_backward(grad, x, weight, 1e-5, offset, other) for part in (kernels, plain_kernels))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def parts_of(ranks: tuple[int, int], number: int, width: int) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
    """What adapters of gate and up add, whose low-rank sides lie beside each other, and a slope with its A."""
    lows = torch.randn(number, sum(ranks)).split(ranks, dim=1)
    made = [Part(low, torch.randn(width, rank), 0.5) if rank else None for low, rank in zip(lows, ranks, strict=True)]
    rank = max(ranks)
    return tuple(made), (torch.randn(number, rank), torch.randn(rank, width))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "halves of one"])
@pytest.mark.parametrize("ranks", [(0, 0), (1, 1), (8, 0), (0, 16), (32, 8), (40, 16), (64, 64)], ids=str)
@pytest.mark.parametrize(("number", "width"), [(37, 190), (600, 530)], ids=["one program", "several"])
def test_gate(gate: ModuleType, kind: str, joined: bool, ranks: tuple[int, int], number: int, width: int) -> None:
    both = torch.randn(number, 2 * width)
    grad = torch.randn(number, width)
    parts, beside = parts_of(ranks, number, width)
    made = []
    for room in (gate, plain_kernels):
        left, right = both.clone().chunk(2, dim=1) if joined else (half.contiguous() for half in both.clone().chunk(2, dim=1))
        product, slope = room.gated(left, right, kind, parts), grad.clone()
        gradients = room.gated_backward_(slope, left, right, kind, parts, beside if max(ranks) else None, product=True)
        torch.testing.assert_close(slope, product, **CLOSE)  # the gradient's place holds the product
        assert [part is None for part in gradients] == [not 0 < max(ranks) <= gate.WIDEST_SUM] * 2
        made.append((product, left, right, *gradients))
    for ours, theirs in zip(*made, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)


def test_a_product_that_nobody_reads_is_not_written(gate: ModuleType) -> None:
    parts, beside = parts_of((8, 8), 20, 130)
    left, right, grad = torch.randn(3, 20, 130).unbind()
    slope = grad.clone()
    gate.gated_backward_(slope, left, right, "silu", parts, beside, product=False)
    assert torch.equal(slope, grad)
    parts, beside = parts_of((64, 64), 20, 130)
    gate.gated_backward_(slope, left, right, "silu", parts, beside, product=False)
    assert not torch.equal(slope, grad)  # A's gradient is made of it


def test_a_gate_completes_what_it_reads(gate: ModuleType) -> None:
    left, right = torch.randn(5, 40), torch.randn(5, 40)
    (one, other), _ = parts_of((8, 16), 5, 40)
    whole = [half + part.scaling * part.low_NR @ part.b_OR.t() for half, part in ((left, one), (right, other))]
    torch.testing.assert_close(gate.gated(left, right, "silu", (one, other)), gate.gated(*whole, "silu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 16, 40, 70])
@pytest.mark.parametrize("given", [(), ("beside",), ("bias",), ("beside", "bias", "out")], ids=str)
def test_what_an_adapter_adds(parts: ModuleType, rank: int, given: tuple[str, ...]) -> None:
    part = Part(torch.randn(37, rank + 3)[:, 3:], torch.randn(150, rank), 0.5)
    beside = torch.randn(37, 150) if "beside" in given else None
    bias, out = torch.randn(150) if "bias" in given else None, torch.empty(37, 150) if "out" in given else None
    expected = 0.5 * part.low_NR @ part.b_OR.t() + (0 if beside is None else beside) + (0 if bias is None else bias)
    for room in (parts, plain_kernels):
        found = room.begun(part, beside, bias, out)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert out is None or found is out


@pytest.mark.parametrize("sizes", [(3,), (1500, 1), (7, 2048, 900), (16, 1, 1, 1, 5000, 3)], ids=str)
def test_tensors_as_one_piece_and_back(parts: ModuleType, sizes: tuple[int, ...]) -> None:
    tensors = [torch.randn(size) for size in sizes]
    whole = parts.joined(tensors, torch.float16)
    assert torch.equal(whole, torch.cat(tensors).half())
    sums = [tensor.clone() for tensor in tensors]
    parts.add_each(whole, sums)
    for tensor, total, numbers in zip(tensors, sums, whole.split(sizes), strict=True):
        assert torch.equal(total, tensor + numbers.float())


@pytest.mark.parametrize(("size", "turned", "normed"), [(24, 24, False), (24, 16, False), (64, 64, False), (24, 24, True), (64, 64, True)])
def test_heads(kernels: ModuleType, size: int, turned: int, normed: bool) -> None:
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

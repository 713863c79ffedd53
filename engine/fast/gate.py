"""The gate of an MLP as Triton kernels: its two products meet, and what adapters add to each is made on the way.

An adapter's part of a wide product is as large as the product. Added by itself it is written and read again for nothing; here a
tile of it is multiplied in registers, 16 numbers deep, by whoever reads the product anyway. So what a layer keeps are the frozen
products alone, and both passes complete them. Numbers are computed in float32 and rounded once, when they are written.

A program goes along some tiles of its rows: the next tile is on its way while one is multiplied, and what is alike for all is read once.

Shapes: N tokens, I inner width, R rank.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qlora_tui.engine.fast.adapted import Part

Activation = Literal["silu", "gelu_tanh"]

WIDEST_RANK = 64
"""Adapters of a higher rank are added by a product of their own: a program has no room for more."""
_ROWS, _BLOCK = 16, 128  # of a tile: as few rows as a tensor core takes, and a whole line of the cache of each (measured beside others)
_TILES, _STAGES = 4, 2  # of a program, and of them in flight: the compiler then asks for the next tile early, with half the barriers
_TILED = {"ROWS": _ROWS, "BLOCK": _BLOCK, "TILES": _TILES, "STAGES": _STAGES}


@triton.jit
def tanh_of(value):
    """Return the hyperbolic tangent, which no exponent overflows."""
    small = tl.exp(-2.0 * tl.abs(value))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(value < 0, -size, size)


@triton.jit
def _activation(value, GELU: tl.constexpr):
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        result = 0.5 * value * (1.0 + tanh_of(inner))
    else:
        result = value * tl.sigmoid(value)
    return result


@triton.jit
def _slope(value, GELU: tl.constexpr):
    if GELU:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        tanh = tanh_of(inner)
        result = 0.5 * (1.0 + tanh) + 0.5 * value * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * value * value)
    else:
        chance = tl.sigmoid(value)
        result = chance * (1.0 + value * (1.0 - chance))
    return result


@triton.jit
def _tile(numbers, places, first, second):
    return tl.load(numbers + places, mask=first & second, other=0.0)


@triton.jit
def _low(low, stride, rows, number, rank, RANK: tl.constexpr):
    """Return some rows of what adapters made of their input, or of its gradient."""
    along = tl.arange(0, RANK)
    return _tile(low, rows[:, None] * stride + along[None, :], rows[:, None] < number, along[None, :] < rank)


@triton.jit
def _read(product, stride, low_NR, b, scaling, rank, rows, at, number, width, ADDED: tl.constexpr, RANK: tl.constexpr):
    """Return a tile of a product in float32, with what its adapter adds where it is `ADDED`: scaling * low B^T, of `rank` numbers each."""
    value = _tile(product, rows[:, None] * stride + at[None, :], rows[:, None] < number, at[None, :] < width).to(tl.float32)
    if ADDED:
        along = tl.arange(0, RANK)
        b_RI = _tile(b, at[None, :] * rank + along[:, None], at[None, :] < width, along[:, None] < rank)
        value += scaling * tl.dot(low_NR, b_RI, input_precision="ieee")
    return value


@triton.jit(do_not_specialize=["number"])  # else each number of tokens might be compiled anew, in the midst of a recording
def _gated(
    gate, up, out, low_gate, b_gate, scaling_gate, rank_gate, low_up, b_up, scaling_up, rank_up,
    number, width, gate_stride, up_stride, low_stride,
    GELU: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    low_left = _low(low_gate, low_stride, rows, number, rank_gate, RANK) if GATE else None
    low_right = _low(low_up, low_stride, rows, number, rank_up, RANK) if UP else None
    for tile in tl.range(0, TILES, num_stages=STAGES):
        at = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = (rows[:, None] < number) & (at[None, :] < width)
        left = _read(gate, gate_stride, low_left, b_gate, scaling_gate, rank_gate, rows, at, number, width, GATE, RANK)
        right = _read(up, up_stride, low_right, b_up, scaling_up, rank_up, rows, at, number, width, UP, RANK)
        tl.store(out + rows[:, None] * width + at[None, :], (_activation(left, GELU) * right).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["number"])  # else each number of tokens might be compiled anew, in the midst of a recording
def _gated_backward(
    grad, gate, up, low_gate, b_gate, scaling_gate, rank_gate, low_up, b_up, scaling_up, rank_up, slope, a, rank,
    number, width, gate_stride, up_stride, low_stride,
    GELU: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    low_left = _low(low_gate, low_stride, rows, number, rank_gate, RANK) if GATE else None
    low_right = _low(low_up, low_stride, rows, number, rank_up, RANK) if UP else None
    slope_NR = _low(slope, rank, rows, number, rank, RANK) if DOWN else None
    along = tl.arange(0, RANK)
    kind = grad.dtype.element_ty
    for tile in tl.range(0, TILES, num_stages=STAGES):
        at = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = (rows[:, None] < number) & (at[None, :] < width)
        of_product = tl.load(grad + rows[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
        left = _read(gate, gate_stride, low_left, b_gate, scaling_gate, rank_gate, rows, at, number, width, GATE, RANK)
        right = _read(up, up_stride, low_right, b_up, scaling_up, rank_up, rows, at, number, width, UP, RANK)
        if DOWN:
            a_RI = _tile(a, along[:, None] * width + at[None, :], along[:, None] < rank, at[None, :] < width)
            of_product += tl.dot(slope_NR, a_RI, input_precision="ieee")
        active = _activation(left, GELU)
        tl.store(grad + rows[:, None] * width + at[None, :], (active * right).to(kind), mask=inside)
        tl.store(gate + rows[:, None] * gate_stride + at[None, :], (of_product * right * _slope(left, GELU)).to(kind), mask=inside)
        tl.store(up + rows[:, None] * up_stride + at[None, :], (of_product * active).to(kind), mask=inside)


Parts = tuple[Part | None, Part | None]
"""What adapters add to gate and to up, of one low-rank product."""


def gated(gate_NI: torch.Tensor, up_NI: torch.Tensor, kind: Activation, parts: Parts = (None, None)) -> torch.Tensor:
    """Return activation(gate) * up [N, I], of both with what adapters add; both may be halves of one tensor."""
    number, width = gate_NI.shape
    out = torch.empty(number, width, dtype=gate_NI.dtype, device=gate_NI.device)
    _gated[_tiled(number, width)](
        gate_NI, up_NI, out, *_of_parts(parts, out), number, width, gate_NI.stride(0), up_NI.stride(0), _stride_of(parts),
        GELU=kind == "gelu_tanh", GATE=parts[0] is not None, UP=parts[1] is not None, RANK=_padded_rank(parts), **_TILED,
    )  # fmt: skip
    return out


def gated_backward_(
    grad_NI: torch.Tensor,
    gate_NI: torch.Tensor,
    up_NI: torch.Tensor,
    kind: Activation,
    parts: Parts = (None, None),
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Overwrite the product's gradient with the product, gate and up with their gradients: three tensors instead of six.

    `parts` are added to gate and up first, and slope [N, R] times A [R, I], which are `beside`, to the product's gradient.
    """
    number, width = gate_NI.shape
    slope_NR, a_RI = beside or (grad_NI, grad_NI)
    _gated_backward[_tiled(number, width)](
        grad_NI, gate_NI, up_NI, *_of_parts(parts, grad_NI), slope_NR, a_RI, slope_NR.shape[1],
        number, width, gate_NI.stride(0), up_NI.stride(0), _stride_of(parts),
        GELU=kind == "gelu_tanh", GATE=parts[0] is not None, UP=parts[1] is not None, DOWN=beside is not None,
        RANK=_padded_rank(parts, 1 if beside is None else len(a_RI)), **_TILED,
    )  # fmt: skip


def _tiled(number: int, width: int) -> tuple[int, int]:
    return triton.cdiv(number, _ROWS), triton.cdiv(width, _BLOCK * _TILES)


def _of_parts(parts: Parts, other: torch.Tensor) -> list[Any]:
    """Return what the kernels take of each part; `other` stands for what is not there."""
    found = list[Any]()
    for part in parts:
        found += [other, other, 1.0, 1] if part is None else [part.low_NR, part.b_OR, part.scaling, part.b_OR.shape[1]]
    return found


def _stride_of(parts: Parts) -> int:
    return next((part.low_NR.stride(0) for part in parts if part is not None), 1)


def _padded_rank(parts: Parts, rank: int = 1) -> int:
    """Return the numbers that the kernels' products sum over: the largest rank, rounded up to what a tensor core takes."""
    return max(16, 1 << (max(rank, *(1 if part is None else part.b_OR.shape[1] for part in parts)) - 1).bit_length())

"""The gate of an MLP as Triton kernels: its two products meet, and what adapters add to each is made on the way.

An adapter's part of a wide product is as large as the product. Added by itself it is written and read again for nothing; here a
tile of it is multiplied in registers, 16 numbers deep, by whoever reads the product anyway. So what a layer keeps are the frozen
products alone, and both passes complete them. Numbers are computed in float32 and rounded once, when they are written.

A program goes along some tiles, forward of its rows and backward of its columns: the next tile is on its way while one is multiplied,
and what is alike for all is read once. Backward it sums the gradients of the adapters beside these tensors on the way, for which they would
be read again. Sums of programs are written apart and added, so that the bits are the same every time. (The low-rank product after the
gate, summed forward in the same way, took five times what a product of its own takes: 2026-11-28.)

Shapes: N tokens, I inner width, R rank.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl

from qlora_tui.engine.fast.lora import Part

Activation = Literal["silu", "gelu_tanh"]

WIDEST_RANK = 64
"""Adapters of a higher rank are added by a product of their own: a program has no room for more."""
WIDEST_SUM = 32
"""Gradients of adapters of a higher rank are made apart, for the same reason: their sums lie in registers all along."""
ROWS_OF_A_SUM = 512
"""Rows that a program of the backward pass goes through: more leave cards idle, fewer write more sums that are added later."""
# Tiles, and how many are in flight: the compiler then asks for the next ones early. Measured beside some sixty others (2026-11-28-step.md).
_FORWARD = {"ROWS": 16, "BLOCK": 128, "TILES": 4, "STAGES": 2}
_BACKWARD = {"ROWS": 16, "BLOCK": 64, "TILES": ROWS_OF_A_SUM // 16, "STAGES": 2}


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
    """Return some rows of a matrix that is as wide as the rank: B, or what adapters made of their input or of its gradient."""
    along = tl.arange(0, RANK)
    return _tile(low, rows[:, None] * stride + along[None, :], rows[:, None] < number, along[None, :] < rank)


@triton.jit
def _times(b, rank, at, width, RANK: tl.constexpr):
    """Return B^T of some outputs."""
    along = tl.arange(0, RANK)
    return _tile(b, at[None, :] * rank + along[:, None], at[None, :] < width, along[:, None] < rank)


@triton.jit
def _read(product, places, inside, first, second, scaling, ADDED: tl.constexpr):
    """Return a tile of a product in float32, with what its adapter adds where it is `ADDED`: scaling * first second."""
    value = tl.load(product + places, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        value += scaling * tl.dot(first, second, input_precision="ieee")
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
        b_left = _times(b_gate, rank_gate, at, width, RANK) if GATE else None
        b_right = _times(b_up, rank_up, at, width, RANK) if UP else None
        left = _read(gate, rows[:, None] * gate_stride + at[None, :], inside, low_left, b_left, scaling_gate, GATE)
        right = _read(up, rows[:, None] * up_stride + at[None, :], inside, low_right, b_right, scaling_up, UP)
        tl.store(out + rows[:, None] * width + at[None, :], (_activation(left, GELU) * right).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keep(
    start, of_left, of_right, of_a, scaling_gate, scaling_up, rank_gate, rank_up, rank, at, width,
    GATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Write the sums of some rows: of B of gate, of B of up, and of A, each as it lies in memory."""
    inside, along = at[:, None] < width, tl.arange(0, RANK)[None, :]
    if GATE:
        tl.store(start + at[:, None] * rank_gate + along, scaling_gate * of_left, mask=inside & (along < rank_gate))
        start += width * rank_gate
    if UP:
        tl.store(start + at[:, None] * rank_up + along, scaling_up * of_right, mask=inside & (along < rank_up))
        start += width * rank_up
    if DOWN:
        tl.store(start + along * width + at[:, None], of_a, mask=inside & (along < rank))


@triton.jit(do_not_specialize=["number"])  # else each number of tokens might be compiled anew, in the midst of a recording
def _gated_backward(
    grad, gate, up, low_gate, b_gate, scaling_gate, rank_gate, low_up, b_up, scaling_up, rank_up, slope, a, rank, sums,
    number, width, gate_stride, up_stride, low_stride,
    GELU: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, SUMS: tl.constexpr, PRODUCT: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # tiles are [columns, rows]: what was computed is then the left side of the products that sum it, and need not change its layout
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    along = tl.arange(0, RANK)
    b_left = _low(b_gate, rank_gate, at, width, rank_gate, RANK) if GATE else None
    b_right = _low(b_up, rank_up, at, width, rank_up, RANK) if UP else None
    a_IR = _tile(a, along[None, :] * width + at[:, None], along[None, :] < rank, at[:, None] < width) if DOWN else None
    of_left = tl.zeros((BLOCK, RANK), tl.float32)
    of_right = tl.zeros((BLOCK, RANK), tl.float32)
    of_a = tl.zeros((BLOCK, RANK), tl.float32)
    kind = grad.dtype.element_ty
    for tile in tl.range(0, TILES, num_stages=STAGES):
        rows = (tl.program_id(1).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (at[:, None] < width) & (rows[None, :] < number)
        places = rows[None, :] * width + at[:, None]
        of_gate_place, of_up_place = rows[None, :] * gate_stride + at[:, None], rows[None, :] * up_stride + at[:, None]
        low_left = _low(low_gate, low_stride, rows, number, rank_gate, RANK) if GATE else None
        low_right = _low(low_up, low_stride, rows, number, rank_up, RANK) if UP else None
        slope_NR = _low(slope, rank, rows, number, rank, RANK) if DOWN else None
        left = _read(gate, of_gate_place, inside, b_left, tl.trans(low_left) if GATE else None, scaling_gate, GATE)
        right = _read(up, of_up_place, inside, b_right, tl.trans(low_right) if UP else None, scaling_up, UP)
        of_product = _read(grad, places, inside, a_IR, tl.trans(slope_NR) if DOWN else None, 1.0, DOWN)
        active = _activation(left, GELU)
        product = (active * right).to(kind)
        of_gate = (of_product * right * _slope(left, GELU)).to(kind)
        of_up = (of_product * active).to(kind)
        if PRODUCT:
            tl.store(grad + places, product, mask=inside)
        tl.store(gate + of_gate_place, of_gate, mask=inside)
        tl.store(up + of_up_place, of_up, mask=inside)
        if SUMS:
            if GATE:
                of_left += tl.dot(of_gate, low_left, input_precision="ieee")
            if UP:
                of_right += tl.dot(of_up, low_right, input_precision="ieee")
            if DOWN:
                of_a += tl.dot(product, slope_NR, input_precision="ieee")
    if SUMS:
        start = sums + tl.program_id(1).to(tl.int64) * width * ((rank_gate if GATE else 0) + (rank_up if UP else 0) + (rank if DOWN else 0))
        _keep(start, of_left, of_right, of_a, scaling_gate, scaling_up, rank_gate, rank_up, rank, at, width, GATE, UP, DOWN, RANK)


Parts = tuple[Part | None, Part | None]
"""What adapters add to gate and to up, of one low-rank product."""


def gated(gate_NI: torch.Tensor, up_NI: torch.Tensor, kind: Activation, parts: Parts = (None, None)) -> torch.Tensor:
    """Return activation(gate) * up [N, I], of both with what adapters add; both may be halves of one tensor."""
    number, width = gate_NI.shape
    out = torch.empty(number, width, dtype=gate_NI.dtype, device=gate_NI.device)
    _gated[(triton.cdiv(number, _FORWARD["ROWS"]), triton.cdiv(width, _FORWARD["BLOCK"] * _FORWARD["TILES"]))](
        gate_NI, up_NI, out, *_of_parts(parts, out), number, width, gate_NI.stride(0), up_NI.stride(0), _stride_of(parts),
        GELU=kind == "gelu_tanh", GATE=parts[0] is not None, UP=parts[1] is not None, RANK=_padded_rank(parts), **_FORWARD,
    )  # fmt: skip
    return out


Gradients = tuple[torch.Tensor | None, torch.Tensor | None]
"""Those of the B's of gate and up, one after the other, and of A, in float32."""


def gated_backward_(
    grad_NI: torch.Tensor,
    gate_NI: torch.Tensor,
    up_NI: torch.Tensor,
    kind: Activation,
    parts: Parts = (None, None),
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    product: bool,
) -> Gradients:
    """Overwrite gate and up with their gradients, and the product's gradient with the product: three tensors instead of six.

    `parts` are added to gate and up first, and slope [N, R] times A [R, I], which are `beside`, to the product's gradient. Up to
    a rank of `WIDEST_SUM` the adapters' gradients are summed on the way: whoever made them later would read all three tensors again.
    Where A's was, nobody needs the product unless the caller says so.
    """
    number, width = gate_NI.shape
    slope_NR, a_RI = beside or (grad_NI, grad_NI)
    ranks = [0 if part is None else part.b_OR.shape[1] for part in parts] + [0 if beside is None else len(a_RI)]
    summed, chunks = 0 < max(ranks) <= WIDEST_SUM, triton.cdiv(number, ROWS_OF_A_SUM)
    sums = torch.empty(chunks, width * sum(ranks), device=grad_NI.device) if summed else grad_NI
    _gated_backward[(triton.cdiv(width, _BACKWARD["BLOCK"]), chunks)](
        grad_NI, gate_NI, up_NI, *_of_parts(parts, grad_NI), slope_NR, a_RI, ranks[-1], sums,
        number, width, gate_NI.stride(0), up_NI.stride(0), _stride_of(parts),
        GELU=kind == "gelu_tanh", GATE=parts[0] is not None, UP=parts[1] is not None, DOWN=beside is not None,
        SUMS=summed, PRODUCT=product or not summed or beside is None, RANK=_padded_rank(parts, max(ranks[-1], 1)), **_BACKWARD,
    )  # fmt: skip
    if not summed:
        return None, None
    of_b, of_a = sums.sum(0).split([width * sum(ranks[:2]), width * ranks[2]])
    return of_b, of_a


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

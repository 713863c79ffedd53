"""Triton kernels between widths: weights from 4 and 8 bits to 16, rows from 16 bits to 8, and the bytes of a weight turned.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qlora_tui.engine.fast.eightbit import LARGEST, TYPES, Kind, Rows

_PAIRS = 2048  # of 4-bit numbers that a program widens
_WIDEST = 1 << 14  # numbers of a row that registers of a block of threads hold
_WIDE_TILE = 1 << 13  # those that it takes at once of a wider one
_PART = 2048  # bytes of a row that a program widens
_SQUARE = 128  # a side of the tile that is turned at once: a line of the cache


def warps(block: int) -> int:
    """Return how many warps share `block` numbers."""
    return min(16, max(1, block // 512))


@triton.jit
def _widen(packed, scales, scale_codes, scales2, offset, codes, out, size, HALF: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    # a row of a tile is a block, so that its scale is read and widened once
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    has = block * HALF < size
    if GROUP > 0:
        code = tl.load(scales + block, mask=has, other=0).to(tl.int32)
        scale = tl.load(scale_codes + code) * tl.load(scales2 + block // GROUP, mask=has, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=has, other=0.0)
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + at, mask=at < size, other=0).to(tl.int32)
    first = tl.load(codes + (pair >> 4)) * scale[:, None]
    second = tl.load(codes + (pair & 15)) * scale[:, None]
    place = block[:, None] * (HALF * 2) + tl.arange(0, HALF * 2)[None, :]
    tl.store(out + place, tl.interleave(first, second).to(out.dtype.element_ty), mask=place < size * 2)


def dequantize(packed: torch.Tensor, state: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weight [O, I] that bitsandbytes packed in 4 bits, in the type of its state: the same bits as its own kernels.

    Scales that are quantized themselves are widened on the way, so nothing but the result is written.

    Args:
        packed: pairs of 4-bit numbers, one a byte.
        state: bitsandbytes' `QuantState` of the weight.
        out: where to write it, if not into new memory.
    """
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
    size, half = packed.numel(), state.blocksize // 2
    inner = state.state2 if state.nested else None
    scales = (state.absmax, inner.code, inner.absmax, state.offset) if inner is not None else (state.absmax,) * 4
    # without fused multiply-adds, whose third rounding bitsandbytes' scales do not have
    blocks = max(1, _PAIRS // half)
    _widen[(triton.cdiv(size, blocks * half),)](
        packed, *scales, state.code, out, size,
        HALF=half, GROUP=inner.blocksize if inner is not None else 0, BLOCKS=blocks, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _times(x, times, row, at, width):
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) * tl.load(times + at, mask=inside, other=0.0)
    return tl.where(value == value, value, float("inf"))  # a maximum forgets what is no number, and the row would look sound


@triton.jit
def _scale_of(largest, SHARE: tl.constexpr):
    """Return the scale of a row whose largest number is `largest`: that of `eightbit.quantize`, to the bit."""
    return tl.maximum(largest, 1e-12) * SHARE


@triton.jit
def _held(value, scale, kind: tl.constexpr):
    """Return numbers as bytes of `kind`, rounded to even: INT8 by what a float32 leaves of a number beside a larger one."""
    scaled = tl.div_rn(value, scale)
    if kind == tl.int8:
        scaled = (scaled + 12582912.0) - 12582912.0
    return scaled.to(kind)


@triton.jit
def _quantize(x, times, held, scales, width, SHARE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    kind = held.dtype.element_ty
    if WHOLE:  # the row is in registers, and read once
        at = tl.arange(0, BLOCK)
        value = _times(x, times, row, at, width)
        scale = _scale_of(tl.max(tl.abs(value)), SHARE)
        tl.store(held + row * width + at, _held(value, scale, kind), mask=at < width)
    else:
        most = tl.zeros((), tl.float32)
        for first in range(0, width, BLOCK):
            most = tl.maximum(most, tl.max(tl.abs(_times(x, times, row, first + tl.arange(0, BLOCK), width))))
        scale = _scale_of(most, SHARE)
        for first in range(0, width, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(held + row * width + at, _held(_times(x, times, row, at, width), scale, kind), mask=at < width)
    tl.store(scales + row, scale)


def quantize(x_NI: torch.Tensor, times_I: torch.Tensor, kind: Kind) -> Rows:
    """Return rows as bytes of `kind`, each number times that of its column first: the bits of `eightbit.quantize`."""
    x_NI, rows = x_NI.contiguous(), Rows.empty(x_NI, kind)
    number, width = x_NI.shape
    block = triton.next_power_of_2(width)
    whole = block <= _WIDEST
    block = block if whole else _WIDE_TILE
    _quantize[(number,)](x_NI, times_I, *rows, width, SHARE=1 / LARGEST[kind], WHOLE=whole, BLOCK=block, num_warps=warps(block))
    return rows


@triton.jit
def _turn(weight, out, rows, columns, SIDE: tl.constexpr):
    first, second = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    tile = tl.load(weight + first[:, None] * columns + second[None, :], mask=(first[:, None] < rows) & (second[None, :] < columns))
    place = out + second[:, None].to(tl.int64) * rows + first[None, :]
    tile = tl.trans(tile).to(tl.float32).to(out.dtype.element_ty)
    tl.store(place, tile, mask=(second[:, None] < columns) & (first[None, :] < rows))


def turned(weight_OI: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return bytes the other way round, as the same numbers in `kind` [I, O]; torch's own copy moved 0.27 TB/s on an H100."""
    rows, columns = weight_OI.shape
    out = torch.empty(columns, rows, dtype=TYPES[kind], device=weight_OI.device)
    _turn[(triton.cdiv(rows, _SQUARE), triton.cdiv(columns, _SQUARE))](weight_OI, out, rows, columns, SIDE=_SQUARE, num_warps=8)
    return out


@triton.jit
def _scaled(held, scales, out, width, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(held + row * width + at, mask=at < width, other=0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)


def scaled(held_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes times the scale of their row [O, I], multiplied in float32 and rounded once."""
    rows, width = held_OI.shape
    out = torch.empty(rows, width, dtype=dtype, device=held_OI.device)
    block = min(triton.next_power_of_2(width), _PART)
    _scaled[(rows, triton.cdiv(width, block))](held_OI, scales_O, out, width, BLOCK=block)
    return out


@triton.jit
def _summed(sums, scales, out, width, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sums + row * width + at, mask=at < width, other=0).to(tl.float32) * tl.load(scales + row)
    if ADDED:
        value += tl.load(out + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)


def summed(sums_NI: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype, into_NI: torch.Tensor | None = None) -> torch.Tensor:
    """Return whole sums times the scale of their row in `dtype`, or added to `into_NI`; multiplied and added in float32, rounded once."""
    rows, width = sums_NI.shape
    out = torch.empty(rows, width, dtype=dtype, device=sums_NI.device) if into_NI is None else into_NI
    block = min(triton.next_power_of_2(width), _PART)
    _summed[(rows, triton.cdiv(width, block))](sums_NI, scales_N, out, width, ADDED=into_NI is not None, BLOCK=block)
    return out

"""What adapters add to frozen products, and their tensors in one piece, as Triton kernels.

An adapter's A's and B's are small, and products that share an input have six of them: cast one by one, and their gradients added one
by one, they keep a card starting kernels. `joined` and `add_each` do it for all at once. Triton's kernels take no list, so they
take `MOST` tensors and where each ends in the piece.

Shapes: N tokens, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from qlora_tui.engine.fast.lora import Part

MOST = 6
"""Tensors of one piece: A and B of three products that share an input."""
_PIECE = 1024  # numbers of one program
_ROWS, _BLOCK = 32, 128  # of a tile of what an adapter adds


@triton.jit
def _within(tensor, at, start, end):
    """Return the places of a piece's numbers `at` in the tensor that lies from `start` to `end`, and which of them it has."""
    return tensor + (at - start), (at >= start) & (at < end)


@triton.jit
def _read(tensor, at, start, end):
    place, has = _within(tensor, at, start, end)
    return tl.load(place, mask=has, other=0.0).to(tl.float32)


@triton.jit
def _join(first, second, third, fourth, fifth, sixth, out, end1, end2, end3, end4, end5, end6, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = _read(first, at, 0, end1) + _read(second, at, end1, end2) + _read(third, at, end2, end3)
    value += _read(fourth, at, end3, end4) + _read(fifth, at, end4, end5) + _read(sixth, at, end5, end6)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < end6)


@triton.jit
def _add_to(tensor, at, value, start, end):
    place, has = _within(tensor, at, start, end)
    tl.store(place, tl.load(place, mask=has, other=0.0) + value, mask=has)


@triton.jit
def _add(first, second, third, fourth, fifth, sixth, whole, end1, end2, end3, end4, end5, end6, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(whole + at, mask=at < end6, other=0.0).to(tl.float32)
    _add_to(first, at, value, 0, end1)
    _add_to(second, at, value, end1, end2)
    _add_to(third, at, value, end2, end3)
    _add_to(fourth, at, value, end3, end4)
    _add_to(fifth, at, value, end4, end5)
    _add_to(sixth, at, value, end5, end6)


def joined(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of up to `MOST` contiguous tensors one after another, in `dtype`."""
    out = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=dtype, device=tensors[0].device)
    _join[(triton.cdiv(len(out), _PIECE),)](*_places(tensors, out), BLOCK=_PIECE)
    return out


def add_each(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Add the numbers of `whole` to up to `MOST` contiguous tensors in float32, to each those that `joined` would take from there."""
    _add[(triton.cdiv(len(whole), _PIECE),)](*_places(tensors, whole), BLOCK=_PIECE)


def _places(tensors: Sequence[torch.Tensor], whole: torch.Tensor) -> list[Any]:
    """Return what the kernels take: the tensors, the piece, and where each tensor ends; the last stands for those that are not there."""
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    missing = MOST - len(tensors)
    return [*tensors, *[tensors[-1]] * missing, whole, *ends, *[ends[-1]] * missing]


@triton.jit(do_not_specialize=["number"])  # else each number of tokens might be compiled anew, in the midst of a recording
def _begun(
    low, b, beside, bias, out, scaling, rank, number, width, low_stride,
    BESIDE: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows[:, None] < number) & (at[None, :] < width)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rank, RANK):
        along = first + tl.arange(0, RANK)
        has = along < rank
        low_NR = tl.load(low + rows[:, None] * low_stride + along[None, :], mask=(rows[:, None] < number) & has[None, :], other=0.0)
        b_RO = tl.load(b + at[None, :] * rank + along[:, None], mask=(at[None, :] < width) & has[:, None], other=0.0)
        total += tl.dot(low_NR, b_RO, input_precision="ieee")
    total *= scaling
    if BESIDE:
        total += tl.load(beside + rows[:, None] * width + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + at, mask=at < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * width + at[None, :], total.to(out.dtype.element_ty), mask=inside)


def begun(
    part: Part, beside_NO: torch.Tensor | None = None, bias_O: torch.Tensor | None = None, out_NO: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what an adapter adds to a product [N, O], plus `beside_NO` and a bias; in `out_NO`, if given."""
    number, (width, rank) = len(part.low_NR), part.b_OR.shape
    out = torch.empty(number, width, dtype=part.b_OR.dtype, device=part.b_OR.device) if out_NO is None else out_NO
    _begun[(triton.cdiv(number, _ROWS), triton.cdiv(width, _BLOCK))](
        part.low_NR, part.b_OR, out if beside_NO is None else beside_NO, out if bias_O is None else bias_O, out,
        part.scaling, rank, number, width, part.low_NR.stride(0),
        BESIDE=beside_NO is not None, BIAS=bias_O is not None, RANK=16 if rank <= 16 else 32, ROWS=_ROWS, BLOCK=_BLOCK,
    )  # fmt: skip
    return out

"""The elementwise work of a step as Triton kernels: each reads and writes its numbers once.

Liger's kernels serve people who train norms too: their backward passes sum a gradient of the norm's weight, which is frozen
here, and none of them widens 4-bit weights. These are the few that a step needs, and nothing else. Every number is computed in
float32 and rounded once, when it is written; the widened 4-bit weights are bitsandbytes' to the bit.

Triton comes with PyTorch's CUDA builds. It compiles a kernel at its first use, which takes about a second each and is kept on
disk; `compiled.why_not` says whether it can.

Shapes: N tokens, H hidden size, I inner width, A attention heads, D size of a head, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qlora_tui.engine.fast.gate import tanh_of
from qlora_tui.engine.fast.widths import warps

WIDEST_ROW = 1 << 14
"""A norm's row is held by one block of threads; hidden sizes above this go the plain way."""
_VOCABULARY_TILE = 4096


@triton.jit
def _norm(
    x, weight, beside, out, rates, width, epsilon,
    OFFSET: tl.constexpr, BESIDE: tl.constexpr, RATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + epsilon)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    result = value * scale * weights
    if BESIDE:
        result += tl.load(beside + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)
    if RATED:
        tl.store(rates + row, scale)


@triton.jit
def _norm_backward(grad, x, weight, beside, out, width, epsilon, OFFSET: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + epsilon)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + OFFSET
    slope = tl.load(grad + row * width + at, mask=inside, other=0.0).to(tl.float32) * weights
    result = scale * (slope - value * (scale * scale * tl.sum(slope * value) / width))
    if BESIDE:
        result += tl.load(beside + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    offset: float = 0.0,
    beside: torch.Tensor | None = None,
    rates_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x / rms(x) * (weight + offset) [N, H], plus `beside`; Gemma's weights are kept less one, so its offset is 1.

    Into `rates_N`, if given, goes 1 / rms(x) of each row, in float32.
    """
    number, width = x_NH.shape
    out = torch.empty_like(x_NH)
    block = triton.next_power_of_2(width)
    _norm[(number,)](
        x_NH, weight_H, x_NH if beside is None else beside, out, out if rates_N is None else rates_N, width, epsilon,
        OFFSET=offset, BESIDE=beside is not None, RATED=rates_N is not None, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return out


def rms_norm_backward(
    grad_NH: torch.Tensor,
    x_NH: torch.Tensor,
    weight_H: torch.Tensor,
    epsilon: float,
    offset: float = 0.0,
    beside: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of a norm's input [N, H], plus `beside`: the gradient that went around the norm; in `out`, if there is one.

    With g = grad * (weight + offset) and r = 1 / rms(x) it is r * (g - x * r^2 * mean(g * x)).
    """
    rows, width = x_NH.shape
    out = torch.empty_like(grad_NH) if out is None else out
    block = triton.next_power_of_2(width)
    other = grad_NH if beside is None else beside
    _norm_backward[(rows,)](
        grad_NH, x_NH, weight_H, other, out, width, epsilon,
        OFFSET=offset, BESIDE=beside is not None, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])  # else each length of a row would be compiled anew
def _heads(
    x,
    out,
    weight,
    cos,
    sin,
    heads,
    size,
    stride,
    half,
    rows,
    epsilon,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    place = token * stride + head * size + at
    left = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(left * left + right * right, axis=1, keep_dims=True) / size + epsilon)
        left *= scale * (tl.load(weight + at, mask=at < half, other=0.0).to(tl.float32) + OFFSET)
        right *= scale * (tl.load(weight + half + at, mask=at < half, other=0.0).to(tl.float32) + OFFSET)
    angle = (token % rows) * half * 2 + at
    across = tl.load(cos + angle, mask=at < half, other=0.0).to(tl.float32)
    along = tl.load(sin + angle, mask=at < half, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + place, (left * across - right * along).to(kind), mask=inside)
    tl.store(out + place + half, (right * across + left * along).to(kind), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # else each length of a row would be compiled anew
def _heads_backward(
    grad,
    x,
    weight,
    cos,
    sin,
    heads,
    size,
    stride,
    half,
    rows,
    epsilon,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (at < half)
    place = token * stride + head * size + at
    first = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(grad + place + half, mask=inside, other=0.0).to(tl.float32)
    angle = (token % rows) * half * 2 + at
    across = tl.load(cos + angle, mask=at < half, other=0.0).to(tl.float32)
    along = tl.load(sin + angle, mask=at < half, other=0.0).to(tl.float32)
    left = first * across + second * along
    right = second * across - first * along
    if NORM:
        before = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        after = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(before * before + after * after, axis=1, keep_dims=True) / size + epsilon)
        left *= tl.load(weight + at, mask=at < half, other=0.0).to(tl.float32) + OFFSET
        right *= tl.load(weight + half + at, mask=at < half, other=0.0).to(tl.float32) + OFFSET
        mean = tl.sum(left * before + right * after, axis=1, keep_dims=True) / size * scale * scale
        left = scale * (left - before * mean)
        right = scale * (right - after * mean)
    kind = grad.dtype.element_ty
    tl.store(grad + place, left.to(kind), mask=inside)
    tl.store(grad + place + half, right.to(kind), mask=inside)


def turn_heads(
    x_NAD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    weight_D: torch.Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
) -> torch.Tensor:
    """Turn the first R numbers of each head by the angle of its token's place; with a weight, after a norm over the head.

    Without a weight `x_NAD` itself is turned and returned; with one it is kept, since the norm's backward pass reads it.

    Args:
        x_NAD: queries, keys or both; heads lie side by side, tokens may be further apart; contiguous if there is a weight.
        cos_TR: of each place; token n has place n % T.
        sin_TR: likewise.
        weight_D: of the norm over each head; it needs R = D.
        epsilon: of the norm.
        offset: of the norm's weight.
    """
    out = x_NAD if weight_D is None else torch.empty_like(x_NAD)
    _heads[(len(x_NAD),)](
        x_NAD,
        out,
        x_NAD if weight_D is None else weight_D,
        *_angles(x_NAD, cos_TR, sin_TR),
        epsilon,
        **_sizes(x_NAD, cos_TR, weight_D, offset),
    )
    return out


def turn_heads_back_(
    grad_NAD: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    x_NAD: torch.Tensor | None = None,
    weight_D: torch.Tensor | None = None,
    epsilon: float = 0.0,
    offset: float = 0.0,
) -> None:
    """Overwrite the gradient of what `turn_heads` returned with the gradient of what it was given."""
    held = (grad_NAD, grad_NAD) if x_NAD is None or weight_D is None else (x_NAD, weight_D)
    _heads_backward[(len(grad_NAD),)](
        grad_NAD, *held, *_angles(grad_NAD, cos_TR, sin_TR), epsilon, **_sizes(grad_NAD, cos_TR, weight_D, offset)
    )


def _angles(x_NAD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> tuple[Any, ...]:
    return cos_TR, sin_TR, x_NAD.shape[1], x_NAD.shape[2], x_NAD.stride(0), cos_TR.shape[1] // 2, len(cos_TR)


def _sizes(x_NAD: torch.Tensor, cos_TR: torch.Tensor, weight_D: torch.Tensor | None, offset: float) -> dict[str, Any]:
    heads, half = triton.next_power_of_2(x_NAD.shape[1]), triton.next_power_of_2(cos_TR.shape[1] // 2)
    return {"OFFSET": offset, "NORM": weight_D is not None, "HEADS": heads, "HALF": half, "num_warps": warps(heads * half)}


@triton.jit
def _cross_entropy(logits, labels, losses, size, cap, CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * size
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(start + at, mask=at < size, other=float("-inf")).to(tl.float32)
        if CAPPED:
            value = tl.where(at < size, cap * tanh_of(value / cap), float("-inf"))
        higher = tl.maximum(most, tl.max(value))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(value - higher))
        most = higher
    log_total = most + tl.log(total)
    label = tl.load(labels + row)
    chosen = tl.load(start + label).to(tl.float32)
    if CAPPED:
        chosen = cap * tanh_of(chosen / cap)
    tl.store(losses + row, log_total - chosen)
    if GRADIENT:
        for first in range(0, size, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(start + at, mask=at < size, other=0.0).to(tl.float32)
            slope = 1.0
            if CAPPED:
                tanh = tanh_of(value / cap)
                value, slope = cap * tanh, 1.0 - tanh * tanh
            chance = tl.exp(value - log_total) - tl.where(at == label, 1.0, 0.0)
            tl.store(start + at, (chance * slope).to(logits.dtype.element_ty), mask=at < size)


def cross_entropy_(logits_NV: torch.Tensor, labels_N: torch.Tensor, softcap: float | None, *, gradient: bool) -> torch.Tensor:
    """Return the loss of each label in float32 [N]; with `gradient` the logits are overwritten by their own gradient.

    The logits' sums are taken in float32 while they are read, so no float32 copy of them is made.

    Args:
        logits_NV: contiguous; before the cap.
        labels_N: the right words.
        softcap: logits are softcap * tanh(logits / softcap), where a family caps them.
        gradient: of the sum of the losses.
    """
    losses = torch.empty(len(labels_N), dtype=torch.float32, device=logits_NV.device)
    if len(labels_N):
        _cross_entropy[(len(labels_N),)](
            logits_NV, labels_N, losses, logits_NV.shape[1], softcap or 1.0,
            CAPPED=softcap is not None, GRADIENT=gradient, BLOCK=_VOCABULARY_TILE, num_warps=8,
        )  # fmt: skip
    return losses

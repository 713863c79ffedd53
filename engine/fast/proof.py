"""Each Triton kernel that runs outside fused layers against plain torch, on a card: where Triton works without naming the card.

A kernel that is compiled wrong would train on wrong numbers and say nothing. This takes a few milliseconds, and what Triton compiles for
it is compiled for the run as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch
from torch.nn import functional as F

from qlora_tui.engine.fast import eightbit, kernels, widths

_ROWS, _WIDTH, _WORDS = 48, 512, 1000
_CLOSE = 2e-3  # of the largest number: a rounding of float16, twice


def wrong(device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernel computes something else than plain torch on `device` in `dtype`, or an empty text."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(_ROWS, _WIDTH, device=device, generator=generator).to(dtype)
    return next((name for name, ours, plain in _pairs(x, generator) if not _same(ours, plain)), "")


def _pairs(x: torch.Tensor, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield each kernel's name with what it makes of `x`, and what plain torch makes of it."""
    for twice in (True, False):
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=twice)
        yield "widening of 4 bits", widths.dequantize(packed, state), bnb.dequantize_4bit(packed, state)
    times = torch.rand(_WIDTH, device=x.device, generator=generator)
    ours, plain = widths.quantize(x, times, "int8"), eightbit.quantize(x.float() * times, "int8")
    yield "rounding to 8 bits", ours.held, plain.held
    yield "rounding to 8 bits", ours.scales, plain.scales
    yield "turning of 8 bits", widths.turned(plain.held, "int8"), plain.held.t()
    yield "widening of 8 bits", widths.scaled(*plain, x.dtype), (plain.held * plain.scales[:, None]).to(x.dtype)
    sums = torch.randint(-(2**20), 2**20, x.shape, device=x.device, dtype=torch.int32, generator=generator)
    scales = plain.scales / 2**20
    yield "scaling of sums", widths.summed(sums, scales, x.dtype), (sums * scales[:, None]).to(x.dtype)
    yield "scaling of sums", widths.summed(sums, scales, x.dtype, x.clone()), (sums * scales[:, None] + x.float()).to(x.dtype)
    logits = torch.randn(_ROWS, _WORDS, device=x.device, generator=generator).mul_(3).to(x.dtype)
    labels = torch.randint(0, _WORDS, (_ROWS,), device=x.device, generator=generator)
    for cap in (None, 5.0):
        leaf = logits.float().requires_grad_()
        with torch.enable_grad():
            losses = F.cross_entropy(leaf if cap is None else cap * torch.tanh(leaf / cap), labels, reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
        written = logits.clone()
        yield "loss", kernels.cross_entropy_(written, labels, cap, gradient=True), losses.detach()
        yield "loss's gradient", written, slope


def _same(ours: torch.Tensor, plain: torch.Tensor) -> bool:
    if not plain.is_floating_point():
        return torch.equal(ours, plain)
    return bool((ours.float() - plain.float()).abs().max() <= _CLOSE * plain.float().abs().max())

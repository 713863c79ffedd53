"""A frozen base at one byte a weight: whole steps of a row's own scale, and nothing else is lost.

Rows are quantized to their largest number, in INT8: what an untouched model loses to that cannot be told from 16 bits, and half their
memory is saved (tests/bench/results has what other ways cost). Forward products read the weight as numbers of 16 bits.

Gradients of inputs are multiplied in FP8 on cards that can, and in INT8 where a card was timed and is faster at it: a gradient is
a direction, drawn from a few rows anyway, so what rounding adds to it does not add up, while a forward pass in FP8 moves the model
itself and was measured to learn worse. Gradients are quantized a token at a time. That product wants the weight the other way round:
it is turned for it and dropped again, one byte a weight. A layer is told which of them (`narrow`); `engine/onebyte.py` says by what rule.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

from qlora_tui.engine.fast import compiled

Kind = Literal["fp8", "int8"]

LARGEST: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}
FP8 = torch.float8_e4m3fn
TYPES: dict[Kind, torch.dtype] = {"fp8": FP8, "int8": torch.int8}
FEWEST_ROWS = 17
"""cuBLAS multiplies no fewer in INT8."""
_TRIED = 64  # rows, inputs and outputs of the product on trial: each a size that all its kernels take
_SMALLEST = 1e-12  # of a row's largest number: a row of zeros keeps its zeros


class Rows(NamedTuple):
    """Rows as bytes [N, I], and the scale of each in float32 [N]."""

    held: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, x_NI: torch.Tensor, kind: Kind) -> Rows:
        """Return room for rows of the shape of `x_NI`, in the type of `kind`."""
        scales_N = torch.empty(len(x_NI), dtype=torch.float32, device=x_NI.device)
        return cls(torch.empty(x_NI.shape, dtype=TYPES[kind], device=x_NI.device), scales_N)


def quantize(rows_NI: torch.Tensor, kind: Kind) -> Rows:
    """Return rows [..., I] as bytes, in the type of `kind`, and the scale of each row in float32 [...]."""
    largest_N = rows_NI.abs().amax(dim=-1).float().clamp_(min=_SMALLEST)
    scales_N = largest_N * (1 / LARGEST[kind])  # a card divides by a number so anyway: one way gives the same bits everywhere
    scaled = rows_NI.float() / scales_N[..., None]
    return Rows(scaled.to(FP8) if kind == "fp8" else scaled.round_().to(torch.int8), scales_N)


class EightBit(torch.nn.Linear):
    """A frozen linear layer whose weight is held as bytes; PEFT and everything that looks for linear layers takes it for one."""

    scales: torch.Tensor
    narrow: Kind | None = None
    """What gradients of its input are multiplied in, if not in 16 bits."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        """Quantize `weight_OI`, on its device."""
        torch.nn.Module.__init__(self)  # the class between would make a weight of its own
        self.out_features, self.in_features = weight_OI.shape
        held, scales_O = quantize(weight_OI, "int8")
        self.weight = torch.nn.Parameter(held, requires_grad=False)
        held_bias = None if bias_O is None else torch.nn.Parameter(bias_O.detach(), requires_grad=False)
        self.register_parameter("bias", held_bias)
        self.register_buffer("scales", scales_O)

    def full(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as numbers [O, I]; multiplied in float32, rounded once."""
        if not compiled.why_not(self.weight.device):
            from qlora_tui.engine.fast import widths  # imports Triton

            return widths.scaled(self.weight, self.scales, dtype)
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        part = max(1, _PIECE // self.in_features)  # float32 for a few rows at a time
        for first in range(0, self.out_features, part):
            rows = slice(first, first + part)
            out[rows] = self.weight[rows].float() * self.scales[rows, None]
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product in the type of `x`, with the weight as numbers."""
        return F.linear(x, self.full(x.dtype), self.bias)


_PIECE = 1 << 24  # weights


def narrow_product(rows_NO: Rows, turned_IO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return g W [N, I], the gradient of a product's input, from the bytes of the weight the other way round.

    In FP8 it is in `dtype`, with the scales of `rows_NO`; in INT8 whole sums in 32 bits, without them. A weight's scales are those of
    its outputs, over which this sums: they have to be in `rows_NO` already.
    """
    held, scales_N = rows_NO
    if held.dtype == torch.int8:
        return torch._int_mm(held, turned_IO.t())
    ones_I = torch.ones(1, len(turned_IO), device=turned_IO.device)
    return torch._scaled_mm(held, turned_IO.t(), scale_a=scales_N[:, None], scale_b=ones_I, out_dtype=dtype, use_fast_accum=True)


@functools.cache
def makes(kind: Kind, device: torch.device) -> bool:
    """Say whether products in `kind` are made on `device`, and are right: libraries lack them for some cards that could make them."""
    ones = torch.ones(_TRIED, _TRIED, device=device).to(TYPES[kind])
    try:
        made = narrow_product(Rows(ones, torch.ones(_TRIED, device=device)), ones, torch.bfloat16)
    except RuntimeError:
        return False
    return bool((made == _TRIED).all())


def summed(sums_NI: torch.Tensor, scales_N: torch.Tensor, into_NI: torch.Tensor) -> torch.Tensor:
    """Add whole sums of a product in INT8, times the scale of their row, to `into_NI`."""
    part = max(1, _PIECE // sums_NI.shape[1])  # float32 for a few rows at a time
    for first in range(0, len(sums_NI), part):
        rows = slice(first, first + part)
        into_NI[rows] = sums_NI[rows].float() * scales_N[rows, None] + into_NI[rows].float()
    return into_NI


def narrow_gradient(layer: torch.nn.Module, grad_NO: torch.Tensor) -> Kind | None:
    """Return what `grad_NO` is multiplied with `layer` in, if not in 16 bits: as it was told, where its kernels take the sizes."""
    if not isinstance(layer, EightBit) or grad_NO.dtype == torch.float32:
        return None
    few = layer.narrow == "int8" and len(grad_NO) < FEWEST_ROWS
    return None if few or layer.in_features % 16 or layer.out_features % 16 else layer.narrow

"""A frozen base at one byte a weight: a number for each output scales its row, and nothing else is lost.

Ten times closer to the original than 4 bits and half the size of 16 (tests/bench/results has what each costs in nats). Rows are
quantized to their largest number: to FP8 (e4m3) for cards that multiply it, from compute capability 8.9 on, else to INT8, whose
even steps are closer still to weights.

Products in 8 bits need their inputs in 8 bits too, quantized a token at a time, so that one loud token does not blur the others;
a loud channel is in every token, and FP8 has its small steps near zero for that. The gradient of the input wants the weight the
other way round; it is turned for that product and dropped again, one byte a weight.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeGuard

import torch
from torch.nn import functional as F

Kind = Literal["fp8", "int8"]

LARGEST: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}
_FP8 = torch.float8_e4m3fn
_SMALLEST = 1e-12  # of a row's largest number: a row of zeros keeps its zeros


class Rows(NamedTuple):
    """Rows as bytes [N, I], and the scale of each in float32 [N]."""

    held: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, x_NI: torch.Tensor) -> Rows:
        """Return room for rows in FP8 of the shape of `x_NI`."""
        scales_N = torch.empty(len(x_NI), dtype=torch.float32, device=x_NI.device)
        return cls(torch.empty(x_NI.shape, dtype=_FP8, device=x_NI.device), scales_N)


def fp8_on(device: torch.device) -> bool:
    """Say whether `device` multiplies FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def kind_for(device: torch.device) -> Kind:
    """Return what a base is quantized to on `device`: what its products can be computed in."""
    return "fp8" if fp8_on(device) else "int8"


def quantize(rows_NI: torch.Tensor, kind: Kind) -> Rows:
    """Return rows [..., I] as bytes, in the type of `kind`, and the scale of each row in float32 [...]."""
    largest_N = rows_NI.abs().amax(dim=-1).float().clamp_(min=_SMALLEST)
    scales_N = largest_N * (1 / LARGEST[kind])  # a card divides by a number so anyway: one way gives the same bits everywhere
    scaled = rows_NI.float() / scales_N[..., None]
    return Rows(scaled.to(_FP8) if kind == "fp8" else scaled.round_().to(torch.int8), scales_N)


class EightBit(torch.nn.Linear):
    """A frozen linear layer whose weight is held as bytes; PEFT and everything that looks for linear layers takes it for one.

    The weight's type is int8 also where it holds FP8: PEFT gives an adapter the type of a base that is a floating-point one.
    """

    scales: torch.Tensor

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, kind: Kind) -> None:
        """Quantize `weight_OI`, on its device."""
        torch.nn.Module.__init__(self)  # the class between would make a weight of its own
        self.out_features, self.in_features = weight_OI.shape
        self.kind = kind
        held, scales_O = quantize(weight_OI, kind)
        self.weight = torch.nn.Parameter(held.view(torch.int8), requires_grad=False)
        held_bias = None if bias_O is None else torch.nn.Parameter(bias_O.detach(), requires_grad=False)
        self.register_parameter("bias", held_bias)
        self.register_buffer("scales", scales_O)

    @property
    def held(self) -> torch.Tensor:
        """Return the weight in the type that it is held in [O, I]."""
        return self.weight.view(_FP8) if self.kind == "fp8" else self.weight

    def full(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as numbers [O, I]; multiplied in float32, rounded once."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        part = max(1, _PIECE // self.in_features)  # float32 for a few rows at a time
        for first in range(0, self.out_features, part):
            rows = slice(first, first + part)
            out[rows] = self.held[rows].float() * self.scales[rows, None]
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product in the type of `x`, with the weight as numbers."""
        return F.linear(x, self.full(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Return what torch shows of a linear layer, and the kind."""
        return f"{super().extra_repr()}, kind={self.kind}"


_PIECE = 1 << 24  # weights


def product(rows_NI: Rows, layer: EightBit, dtype: torch.dtype) -> torch.Tensor:
    """Return x W^T in `dtype` [N, O] of quantized rows, without the bias."""
    return _scaled(rows_NI, layer.held.t(), layer.scales, dtype)


def input_gradient(rows_NO: Rows, layer: EightBit, turned_IO: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return g W [N, I], the gradient of a product's input, from the weight the other way round.

    A weight's scales are those of its outputs, over which this sums: they have to be in `rows_NO` already.
    """
    ones_I = torch.ones(layer.in_features, device=turned_IO.device)
    return _scaled(rows_NO, turned_IO.view(_FP8).t(), ones_I, dtype)


def multiplies(layer: torch.nn.Module, x: torch.Tensor) -> TypeGuard[EightBit]:
    """Say whether products of `x` with `layer` are computed in FP8: a card for it, and sizes that its kernels take."""
    if not isinstance(layer, EightBit) or layer.kind != "fp8" or x.dtype != torch.bfloat16:
        return False
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0 and fp8_on(x.device)


def _scaled(rows_NI: Rows, weight_IO: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the product of two 8-bit matrices, the second laid out by columns, times both scales."""
    held, scales_N = rows_NI
    return torch._scaled_mm(held, weight_IO, scale_a=scales_N[:, None], scale_b=scales_O[None, :], out_dtype=dtype, use_fast_accum=True)

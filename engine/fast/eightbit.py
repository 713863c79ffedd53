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

from typing import Literal

import torch
from torch.nn import functional as F

Kind = Literal["fp8", "int8"]

LARGEST: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}
_FP8 = torch.float8_e4m3fn
_SMALLEST = 1e-12  # of a row's largest number: a row of zeros keeps its zeros


def kind_for(device: torch.device) -> Kind:
    """Return what a base is quantized to on `device`: what its products can be computed in."""
    return "fp8" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9) else "int8"


def quantize(rows_NI: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [..., I] as bytes, in the type of `kind`, and the scale of each row in float32 [...]."""
    largest_N = rows_NI.abs().amax(dim=-1).float().clamp_(min=_SMALLEST)
    scales_N = largest_N / LARGEST[kind]
    scaled = rows_NI.float() / scales_N[..., None]
    return scaled.to(_FP8) if kind == "fp8" else scaled.round_().to(torch.int8), scales_N


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


def product(x_NI: torch.Tensor, layer: EightBit) -> torch.Tensor:
    """Return x W^T in `x`'s type [N, O], computed in 8 bits where `layer` and the device allow it; without the bias."""
    if not multiplies(layer, x_NI):
        return x_NI @ layer.full(x_NI.dtype).t()
    held, scales_N = quantize(x_NI, "fp8")
    return _scaled(held, scales_N, layer.held.t(), layer.scales, x_NI.dtype)


def input_gradient(grad_NO: torch.Tensor, layer: EightBit) -> torch.Tensor:
    """Return g W [N, I], the gradient of a product's input; the weight's scales go into `grad_NO`, over whose outputs it sums."""
    if not multiplies(layer, grad_NO):
        return grad_NO @ layer.full(grad_NO.dtype)
    held, scales_N = quantize(grad_NO.float() * layer.scales, "fp8")
    turned = layer.weight.t().contiguous().view(_FP8)
    return _scaled(held, scales_N, turned.t(), torch.ones(layer.in_features, device=held.device), grad_NO.dtype)


def multiplies(layer: EightBit, x: torch.Tensor) -> bool:
    """Say whether products with `layer` are computed in FP8: a card for it, and sizes that its kernels take."""
    even = layer.in_features % 16 == 0 and layer.out_features % 16 == 0
    return (
        layer.kind == "fp8"
        and even
        and x.dtype == torch.bfloat16
        and x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device) >= (8, 9)
    )


def _scaled(
    x_NI: torch.Tensor, scales_N: torch.Tensor, weight_IO: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return the product of two 8-bit matrices, the second laid out by columns, times both scales."""
    return torch._scaled_mm(x_NI, weight_IO, scale_a=scales_N[:, None], scale_b=scales_O[None, :], out_dtype=dtype, use_fast_accum=True)

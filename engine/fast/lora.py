"""A LoRA linear layer as one autograd operation over a 4-bit or 16-bit base.

PEFT's own forward casts inputs to float32, clones the base's output and keeps several copies of the
activations for the backward pass. Here the input is kept once, the base weight is dequantized when it is
needed and dropped, and the adapter's float32 weights are cast to the activations' type for the products, so
no autocast context is needed. PEFT keeps the parameters, names, saving and switching off.

Two variants go through the same operation: PiSSA subtracts the frozen product that the adapter started from,
and DoRA scales the outputs to lengths that are trained.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.fast.base import full_weight, input_gradient

ADAPTER = "default"
_SHORTEST = 1e-12  # squared length of an output's weights below which it counts as this: a row of zeros has no direction

Start = tuple[torch.Tensor, torch.Tensor]
"""What an adapter started from and is measured against: frozen A [R, I] and B [O, R] in the base's type."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter adds to a product, not multiplied yet: scaling * low B^T [N, O]."""

    low_NR: torch.Tensor
    b_OR: torch.Tensor
    scaling: float

    def outputs(self, some: slice) -> Part:
        """Return the same for some of the outputs."""
        return Part(self.low_NR, self.b_OR[some], self.scaling)


def fuse(model: torch.nn.Module) -> int:
    """Give every LoRA layer of `model` the one-operation forward; return how many there are.

    Raises:
        ModelError: a layer is something the operation does not cover.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if ADAPTER not in layer.lora_A or layer.lora_A[ADAPTER].bias is not None or layer.fan_in_fan_out:
            raise ModelError(f"adapter layer {type(layer).__name__} is of a kind that cannot be trained here")
        layer.forward = _Forward(layer)  # an instance attribute: the class, and every other model, stays as PEFT made it
    return len(layers)


def adapter_parts(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield each part of the adapter with its name, such as `...q_proj.lora_A`: together they hold every trained tensor, of DoRA too."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("lora_"):
            yield name, module


def fused(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every layer that `fuse` changed, with its name; `layer.forward.start` is what its adapter started from."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module.forward, _Forward):
            yield name, module


def start_lengths(model: torch.nn.Module) -> None:
    """Set the lengths that DoRA trains to those of the base, in float32.

    PEFT measures them in the base's type, and in bfloat16 they would miss by up to 0.4 %: the adapter would not
    start as a no-op.
    """
    for _, layer in fused(model):
        if (magnitude := _magnitude(layer)) is not None:
            magnitude.data = layer.forward.base_squares().sqrt()


class _Forward:
    """The forward of one layer; looks at PEFT's switches on every call, so switching off works as always."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer
        self.start: Start | None = None
        self._squares: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, base = self.layer, self.layer.get_base_layer()
        if layer.disable_adapters:
            return F.linear(x, full_weight(base, x.dtype), base.bias)
        dropout = layer.lora_dropout[ADAPTER]
        dropped = None if isinstance(dropout, torch.nn.Identity) or not dropout.training else dropout(x)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        magnitude, scaling = _magnitude(layer), layer.scaling[ADAPTER]
        if magnitude is None:
            return _product(x, dropped, base, base.bias, a, b, self.start, scaling)
        # The lengths are constants for the gradient, as in section 4.3 of the DoRA paper; the product is scaled in
        # float32, where small changes of a length would be lost in bfloat16.
        scale_O = magnitude / self._lengths(a.detach(), b.detach(), scaling)
        out = (_product(x, None, base, None, a, b, None, scaling) * scale_O).to(x.dtype)
        return out if base.bias is None else out + base.bias

    @torch.no_grad()
    def base_squares(self) -> torch.Tensor:
        """Return the squared length of each output's base weights [O] in float32; the base is frozen, so once is enough."""
        if self._squares is None:
            weight = full_weight(self.layer.get_base_layer(), torch.float32)
            self._squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_().clamp_(min=_SHORTEST)
        return self._squares

    @torch.no_grad()
    def _lengths(self, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the length of each row of W + scaling * B A [O], without ever making that sum.

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, a product of the rank's width; it costs one more
        dequantization of a 4-bit base.
        """
        weight = full_weight(self.layer.get_base_layer(), torch.float32)
        cross_OR = (weight @ a_RI.to(weight.dtype).t()).float()
        squares_O = self.base_squares() + ((2 * scaling * cross_OR + scaling**2 * (b_OR @ (a_RI @ a_RI.t()))) * b_OR).sum(1)
        return squares_O.clamp_(min=_SHORTEST).sqrt_()


def _magnitude(layer: LoraLayer) -> torch.nn.Parameter | None:
    """Return the lengths that DoRA trains [O], or None for a layer without it."""
    held = layer.lora_magnitude_vector
    return held[ADAPTER].weight if ADAPTER in held else None


def _product(
    x: torch.Tensor,
    dropped: torch.Tensor | None,
    base: torch.nn.Module,
    bias: torch.Tensor | None,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    start: Start | None,
    scaling: float,
) -> torch.Tensor:
    out: torch.Tensor = _LoraLinear.apply(x, dropped, base, bias, a_RI, b_OR, start, scaling)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return out


def joined(a_RI: torch.Tensor, b_OR: torch.Tensor, start: Start | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in `dtype`; with a start, of twice the rank: B A - B0 A0 in one product, so that equal parts cancel exactly."""
    a, b = a_RI.to(dtype), b_OR.to(dtype)
    if start is None:
        return a, b
    return torch.cat((a, start[0].to(dtype))), torch.cat((b, -start[1].to(dtype)), dim=1)


class _LoraLinear(torch.autograd.Function):
    """y = W x + bias + scaling * (B A - B0 A0) x; gradients for x, A and B, none for what is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        base: torch.nn.Module,
        bias: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        start: Start | None,
        scaling: float,
    ) -> torch.Tensor:
        source = x if dropped is None else dropped
        a, b = joined(a_RI, b_OR, start, x.dtype)
        low = F.linear(source, a)
        out = F.linear(x, full_weight(base, x.dtype), bias)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]), b.t(), alpha=scaling)
        if start is not None:
            low = low[..., : len(a_RI)].clone()  # the frozen half needs no gradient, so it is not kept
        ctx.save_for_backward(source, low, a_RI, b_OR)
        ctx.base, ctx.start, ctx.scaling, ctx.has_dropout = base, start, scaling, dropped is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, low, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        a, b = joined(a_RI, b_OR, ctx.start, grad_NO.dtype)
        low_NR = low.reshape(-1, low.shape[-1])
        grad_low_NR = (grad_NO @ b).mul_(ctx.scaling)
        trained_NR = grad_low_NR[:, : len(a_RI)]
        shape, grad_a = source.shape, (trained_NR.t() @ source.reshape(-1, source.shape[-1])).to(a_RI.dtype)
        del source  # in a recomputed layer this was the last that held it, and a gradient of its size comes next
        grad_b = (grad_NO.t() @ low_NR).mul_(ctx.scaling).to(b_OR.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_NI = input_gradient(grad_NO, ctx.base)
            if not ctx.has_dropout:
                grad_NI.addmm_(grad_low_NR, a)
            grad_x = grad_NI.view(shape)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low_NR @ a).view(shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None

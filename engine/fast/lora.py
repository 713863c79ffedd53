"""A LoRA linear layer as one autograd operation over a 4-bit or 16-bit base.

PEFT's own forward casts inputs to float32, clones the base's output and keeps several copies of the
activations for the backward pass. Here the input is kept once, the base weight is dequantized when it is
needed and dropped, and the adapter's float32 weights are cast to the activations' type for the products, so
no autocast context is needed. PEFT keeps the parameters, names, saving and switching off.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from qlora_tui.engine.errors import ModelError

ADAPTER = "default"


def fuse(model: torch.nn.Module) -> int:
    """Give every LoRA layer of `model` the one-operation forward; return how many there are.

    Raises:
        ModelError: a layer is something the operation does not cover.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if ADAPTER not in layer.lora_A or layer.use_dora.get(ADAPTER) or layer.lora_A[ADAPTER].bias is not None:
            raise ModelError(f"adapter layer {type(layer).__name__} is of a kind that cannot be trained here")
        layer.forward = _Forward(layer)  # an instance attribute: the class, and every other model, stays as PEFT made it
    return len(layers)


class _Forward:
    """The forward of one layer; looks at PEFT's switches on every call, so switching off works as always."""

    def __init__(self, layer: LoraLayer) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, base = self.layer, self.layer.get_base_layer()
        if layer.disable_adapters:
            return F.linear(x, full_weight(base.weight), base.bias)
        dropout = layer.lora_dropout[ADAPTER]
        dropped = None if isinstance(dropout, torch.nn.Identity) or not dropout.training else dropout(x)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        scaling = layer.scaling[ADAPTER]
        out: torch.Tensor = _LoraLinear.apply(x, dropped, base.weight, base.bias, a, b, scaling)  # type: ignore[no-untyped-call]  # torch leaves it bare
        return out


def full_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return the base weight [O, I] as numbers, dequantized if it is stored in 4 bits."""
    state = weight.quant_state if hasattr(weight, "quant_state") else None  # only bitsandbytes' parameters carry one
    if state is None:
        return weight.detach()
    full: torch.Tensor = bnb.dequantize_4bit(weight.data, state)
    return full


class _LoraLinear(torch.autograd.Function):
    """y = W x + bias + scaling * B A x; gradients for x, A and B, none for the frozen base."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        source = x if dropped is None else dropped
        a, b = a_RI.to(x.dtype), b_OR.to(x.dtype)
        low = F.linear(source, a)
        out = F.linear(x, full_weight(weight), bias)
        flat = out.view(-1, out.shape[-1])
        flat.addmm_(low.reshape(-1, low.shape[-1]), b.t(), alpha=scaling)
        ctx.save_for_backward(source, low, a_RI, b_OR)
        ctx.weight, ctx.scaling, ctx.has_dropout = weight, scaling, dropped is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, low, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grads[0].reshape(-1, grads[0].shape[-1])
        a, b = a_RI.to(grad_NO.dtype), b_OR.to(grad_NO.dtype)
        low_NR = low.reshape(-1, low.shape[-1])
        grad_low_NR = (grad_NO @ b).mul_(ctx.scaling)
        grad_a = (grad_low_NR.t() @ source.reshape(-1, source.shape[-1])).to(a_RI.dtype)
        grad_b = (grad_NO.t() @ low_NR).mul_(ctx.scaling).to(b_OR.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_NI = grad_NO @ full_weight(ctx.weight)
            if not ctx.has_dropout:
                grad_NI.addmm_(grad_low_NR, a)
            grad_x = grad_NI.view(source.shape)
        if ctx.has_dropout and ctx.needs_input_grad[1]:
            grad_dropped = (grad_low_NR @ a).view(source.shape)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None

"""PiSSA: the adapter starts from the main directions of the base's weights instead of from nothing.

PEFT takes those directions out of the base's weights. Here the base is left alone and the operation subtracts the
frozen product that the adapter started from: W x + scaling * (B A - B0 A0) x, the same function and the same
gradients. So the adapter off is the base, the adapter on is the base too before step 1, nothing is rounded twice,
and a checkpoint needs no second look at the base. It costs a second, frozen adapter in the base's type.

What is saved is that difference as a plain LoRA of twice the rank, [A; A0] and [B, -B0]: any tool loads it on the
original base. Reading it back splits it again, to the bit.

Source: Meng, Wang and Zhang, "PiSSA", 2024, equations 2 to 4; the randomized decomposition is section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from peft import LoraConfig

from qlora_tui.engine.fast.base import full_weight
from qlora_tui.engine.fast.lora import ADAPTER, fused

_MORE, _ROUNDS = 16, 8  # extra directions and power rounds of the randomized decomposition: within 1 % of the exact one


def start(model: torch.nn.Module) -> None:
    """Set the adapter of every fused layer to the main directions of its base, and remember them as its start.

    A and B begin at exactly what is subtracted, in the base's type, so the first forward pass is the base's.
    """
    for _, layer in fused(model):
        weight = full_weight(layer.get_base_layer(), torch.float32)
        a, b = main_directions(weight.float(), layer.r[ADAPTER], layer.scaling[ADAPTER])
        frozen = (a.to(weight.dtype), b.to(weight.dtype))
        for part, value in zip((layer.lora_A, layer.lora_B), frozen, strict=True):
            part[ADAPTER].weight.data = value.float().clone()  # of its own: training must not move what is subtracted
        layer.forward.start = frozen


def main_directions(weight_OI: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [R, I] and B [O, R] such that scaling * B A is about the best approximation of `weight_OI` of that rank."""
    wide = min(rank + _MORE, *weight_OI.shape)
    left, sizes, right = torch.svd_lowrank(weight_OI, q=wide, niter=_ROUNDS)
    root = (sizes[:rank] / scaling).sqrt()
    return (right[:, :rank] * root).t().contiguous(), (left[:, :rank] * root).contiguous()


def joined(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the adapter's `weights` as saved: with a start, a plain LoRA of twice the rank; else unchanged."""
    found = dict(weights)
    for name, layer in fused(model):
        if (frozen := layer.forward.start) is not None:
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            found[a] = torch.cat((found[a], frozen[0].to(found[a].dtype)))
            found[b] = torch.cat((found[b], -frozen[1].to(found[b].dtype)), dim=1)
    return found


def split(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `joined` was given, and put the start that was saved back into `model`."""
    found = dict(weights)
    for name, layer in fused(model):
        if (frozen := layer.forward.start) is not None:
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            rank = len(found[a]) // 2
            layer.forward.start = (found[a][rank:].to(frozen[0]), (-found[b][:, rank:]).to(frozen[1]))
            found[a], found[b] = found[a][:rank].contiguous(), found[b][:, :rank].contiguous()
    return found


def joined_config(model: torch.nn.Module, config: LoraConfig) -> LoraConfig:
    """Return the description that belongs to `joined` weights: twice the rank and the same scaling."""
    found = copy.copy(config)
    if any(layer.forward.start is not None for _, layer in fused(model)):
        found.r = 2 * config.r
        found.lora_alpha = config.lora_alpha * math.sqrt(2) if config.use_rslora else 2 * config.lora_alpha
    return found

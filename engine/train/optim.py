"""The optimizer: 8-bit and paged where a card is short of memory, plain where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import bitsandbytes
import torch

from qlora_tui.engine.spec import RunConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8


def choose_optimizer(run: RunConfig, device: torch.device) -> str:
    """Return the optimizer's name: paged 8-bit AdamW on CUDA, plain AdamW on a CPU, unless one was asked for."""
    return ("paged_adamw_8bit" if device.type == "cuda" else "adamw_torch") if run.optim == "auto" else run.optim


def build_optimizer(run: RunConfig, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of `run` over `parameters` by name; each group's `scale` is its share of the learning rate."""
    kinds = {
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "adamw_torch": torch.optim.AdamW,
    }
    made: torch.optim.Optimizer = kinds[choose_optimizer(run, device)](
        _groups(run, parameters), lr=run.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=run.weight_decay
    )
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; a group with a scale of its own gets that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def _groups(run: RunConfig, parameters: Mapping[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Return the parameters in one group, or with LoRA+ the B matrices in a second one that learns faster.

    Source: Hayou, Ghosh and Yu, "LoRA+", 2024, section 3: B starts at zero and can take a larger step than A.
    """
    if run.loraplus_lr_ratio == 1:
        return [{"params": list(parameters.values()), "scale": 1.0}]
    faster = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
    rest = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
    return [{"params": rest, "scale": 1.0}, {"params": faster, "scale": run.loraplus_lr_ratio}]


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Return the length of all gradients together, before clipping; this waits for the device once a step."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def clip(parameters: Iterable[torch.nn.Parameter], norm: float, longest: float) -> bool:
    """Scale gradients of length `norm` down to `longest`; say whether that was needed. A non-finite norm is the caller's to refuse."""
    if not longest or not math.isfinite(norm) or norm <= longest:
        return False
    torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], longest / norm)
    return True

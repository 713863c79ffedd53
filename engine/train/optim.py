"""The optimizer: 8-bit and paged where a card is short of memory, plain where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import bitsandbytes
import torch

from qlora_tui.engine.spec import RunConfig

BETAS, EPSILON = (0.9, 0.999), 1e-8


def choose_optimizer(run: RunConfig, device: torch.device) -> str:
    """Return the optimizer's name: paged 8-bit AdamW on CUDA, plain AdamW on a CPU, unless one was asked for."""
    return ("paged_adamw_8bit" if device.type == "cuda" else "adamw_torch") if run.optim == "auto" else run.optim


def build_optimizer(run: RunConfig, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of `run` over `parameters`."""
    kinds = {
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "adamw_torch": torch.optim.AdamW,
    }
    made: torch.optim.Optimizer = kinds[choose_optimizer(run, device)](
        list(parameters), lr=run.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=run.weight_decay
    )
    return made


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

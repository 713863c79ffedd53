"""The optimizer: 8-bit and paged where a card is short of memory, plain where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import bitsandbytes
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.states import EIGHT
from qlora_tui.engine.spec import RunConfig

MIN_8BIT = 4096
"""Numbers from which a tensor's state has 8 bits; fewer cost little in 32, and one constant for 256 would be coarse."""
BETAS, EPSILON = (0.9, 0.999), 1e-8


def choose_optimizer(run: RunConfig, device: torch.device) -> str:
    """Return the optimizer's name: paged 8-bit AdamW on CUDA, plain AdamW on a CPU, unless one was asked for."""
    return ("paged_adamw_8bit" if device.type == "cuda" else "adamw_torch") if run.optim == "auto" else run.optim


class Kind(NamedTuple):
    """What parameters of one group share: `scale` is their share of the learning rate, `bits` those of the optimizer's state."""

    scale: float
    bits: int


def flatten(run: RunConfig, parameters: Mapping[str, torch.nn.Parameter], device: torch.device) -> Flat[Kind]:
    """Move `parameters` into one buffer as the optimizer of `run` groups them.

    With LoRA+ the B matrices learn faster. An 8-bit optimizer keeps the state of tensors below `MIN_8BIT` in 32 bits, such as
    most of DoRA's lengths: that is bitsandbytes' own rule for a tensor alone, so a run gives the same bits either way and goes
    on from checkpoints that were written tensor by tensor.

    Source: Hayou, Ghosh and Yu, "LoRA+", 2024, section 3: B starts at zero and can take a larger step than A.
    """
    plain = choose_optimizer(run, device) == "adamw_torch"
    faster = {name for name in parameters if run.loraplus_lr_ratio != 1 and ".lora_B." in name}
    ordered = sorted(parameters, key=lambda name: name in faster)  # checkpoints count tensors in this order
    kinds = [
        Kind(run.loraplus_lr_ratio if name in faster else 1.0, 32 if plain or parameters[name].numel() < MIN_8BIT else EIGHT)
        for name in ordered
    ]
    return Flat([parameters[name] for name in ordered], kinds)


class _ByGroup(Optimizer8bit):  # type: ignore[misc]  # bitsandbytes has no types
    """Lets each group say how many bits its state has, and updates it without waiting for the device.

    bitsandbytes goes by a tensor's size, and a group is always large. It also waits after each tensor, for whoever reads a paged state
    from the host: here that is `fast.states` alone, which waits itself, and meanwhile the next step is prepared.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every group that has a gradient; the device may still be at it when this returns."""
        for at, group in enumerate(self.param_groups):
            (parameter,) = group["params"]
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.init_state(group, parameter, at, 0)
            self.prefetch_state(parameter)
            self.update_step(group, parameter, at, 0)

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Return bitsandbytes' settings for one tensor, with the group's own bits."""
        settings: dict[str, Any] = super().get_config(gindex, pindex, group)
        return settings | {"optim_bits": group["bits"]}


class AdamW8bit(_ByGroup, bitsandbytes.optim.AdamW8bit):  # type: ignore[misc]  # as above
    """8-bit AdamW; checkpoints know it by this name, which is bitsandbytes' own."""


class PagedAdamW8bit(_ByGroup, bitsandbytes.optim.PagedAdamW8bit):  # type: ignore[misc]  # as above
    """8-bit AdamW whose large states the driver may move to RAM; checkpoints know it by this name, which is bitsandbytes' own."""


def build_optimizer(run: RunConfig, flat: Flat[Kind], device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer of `run` over what `flat` holds, one parameter for each group of it.

    Each of its groups has a `scale`, its share of the learning rate, `bits` and `members`: which tensors it is made of.
    """
    kinds = {"paged_adamw_8bit": PagedAdamW8bit, "adamw_8bit": AdamW8bit, "adamw_torch": torch.optim.AdamW}
    groups = [{"params": [group.parameter], "members": group.members, **group.kind._asdict()} for group in flat.groups]
    made: torch.optim.Optimizer = kinds[choose_optimizer(run, device)](
        groups, lr=run.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=run.weight_decay
    )
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step; a group with a scale of its own gets that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the length of all gradients together, before clipping; nothing here waits for the device."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def clip(flat: Flat[Kind], norm: float, longest: float) -> bool:
    """Scale gradients of length `norm` down to `longest`; say whether that was needed. A non-finite norm is the caller's to refuse."""
    if not longest or not math.isfinite(norm) or norm <= longest:
        return False
    flat.scale(longest / norm)
    return True

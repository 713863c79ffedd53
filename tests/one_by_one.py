"""The reference for `engine/fast/flat.py`: every tensor updated alone, by the libraries' own optimizers, and saved as it was then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch

from qlora_tui.engine.fast import states
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import BETAS, EPSILON, build_optimizer, flatten, set_rate

KINDS: dict[str, Any] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_8bit": bitsandbytes.optim.AdamW8bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
SHAPES = ((16, 64), (64, 16), (37, 129), (129, 37), (7, 2048), (2048, 7), (4095,), (64, 64), (1,), (5000,), (4097,), (4100,))
"""Below and above the 4,096 numbers from which states have 8 bits, with last blocks that are full and that are not."""


@dataclass
class Pair:
    """The same tensors twice: `alone` in an optimizer that goes one by one, `together` in one that does not."""

    alone: dict[str, torch.nn.Parameter]
    together: dict[str, torch.nn.Parameter]
    reference: torch.optim.Optimizer
    flat: Flat[Any]
    optimizer: torch.optim.Optimizer

    def step(self, number: int, rate: float = 1e-2) -> None:
        """Take one step on the same random gradients; those of A are zero in the first, as where B starts at zero."""
        torch.manual_seed(number)
        self.flat.lend()
        for name, parameter in self.alone.items():
            parameter.grad = torch.randn(parameter.shape).to(parameter.device) * (0.0 if number == 0 and "lora_A" in name else 1e-3)
            held = self.together[name].grad
            assert held is not None
            held.copy_(parameter.grad)
        for optimizer in (self.reference, self.optimizer):
            set_rate(optimizer, rate)
            optimizer.step()
        self.flat.clear()

    def differ(self) -> list[str]:
        """Return the names of tensors, and of parts of the optimizers' states, that are not the same to the bit."""
        (old, rest), (new, other) = saved_one_by_one(self.reference), states.split(self.optimizer)
        found = [name for name, parameter in self.alone.items() if not torch.equal(parameter, self.together[name])]
        found += [name for name in old.keys() | new.keys() if name not in old or name not in new or not same(old[name], new[name])]
        return found + ([] if rest == other else ["what is no tensor"])


def pair(run: RunConfig, device: torch.device, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Pair:
    """Return tensors of `shapes`, A and B in turn, in both optimizers of `run`."""
    torch.manual_seed(run.seed)
    alone = {f"{at}.lora_{'AB'[at % 2]}.default.weight": torch.nn.Parameter(torch.randn(shape)) for at, shape in enumerate(shapes)}
    alone = {name: torch.nn.Parameter(part.detach().to(device)) for name, part in alone.items()}
    together = {name: torch.nn.Parameter(part.detach().clone()) for name, part in alone.items()}
    plus = run.loraplus_lr_ratio != 1
    rest = [part for name, part in alone.items() if not (plus and ".lora_B." in name)]
    faster = [part for name, part in alone.items() if plus and ".lora_B." in name]
    groups = [{"params": part, "scale": scale} for part, scale in ((rest, 1.0), (faster, run.loraplus_lr_ratio)) if part]
    reference = KINDS[run.optim](groups, lr=run.learning_rate, betas=BETAS, eps=EPSILON, weight_decay=run.weight_decay)
    flat = flatten(run, together, device)
    return Pair(alone, together, reference, flat, build_optimizer(run, flat, device))


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def saved_one_by_one(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a state as checkpoints held it when every tensor was updated alone: by the place of its tensor in the groups."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for number, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().clone()
            else:
                numbers.setdefault(str(number), {})[name] = value
    return tensors, {"numbers": numbers, "kind": type(optimizer).__name__}

"""What keeps training from being corrupted silently: one owner thread, checked steps, guarded excursions.

A second thread that switches an adapter off between forward and backward changes no loss and raises no
error: the gradients are simply missing. So the owner is remembered, and what must hold before a step is
checked before every step; the cost is microseconds.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft.tuners.lora import LoraLayer

from qlora_tui.engine.errors import FenceError
from qlora_tui.engine.load import Loaded, trainable

_EXCURSION, _IDLE = "evaluation", "between steps"


class Fence:
    """Remembers who owns the model and what it looked like; refuses anybody and anything else."""

    def __init__(self, loaded: Loaded) -> None:
        """Make the calling thread the owner of the model; every forward pass, by whatever door, passes the decoder's hook."""
        self._model = model = loaded.model
        self._owner = threading.get_ident()
        self._owner_name = threading.current_thread().name
        self._phase = _IDLE
        self._trained = trainable(model)
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        loaded.decoder.register_forward_pre_hook(lambda *_: self.check())

    def check(self) -> None:
        """Refuse a foreign thread.

        Raises:
            FenceError: the caller is not the owner; both threads and the phase are named.
        """
        if threading.get_ident() != self._owner:
            name = threading.current_thread().name
            raise FenceError(f"thread {name!r} touched the model that {self._owner_name!r} owns, during {self._phase}")

    def before_step(self, supervised: int) -> None:
        """Check what must hold before an optimizer step.

        Raises:
            FenceError: the first thing that does not hold, by name.
        """
        self.check()
        missing = [name for name, parameter in self._trained.items() if parameter.grad is None]
        faults = {
            f"{len(missing)} of {len(self._trained)} trained tensors have no gradient ({', '.join(missing[:2])})": bool(missing),
            "a trained tensor no longer asks for gradients": not all(parameter.requires_grad for parameter in self._trained.values()),
            "the model is not in training mode": not self._model.training,
            "an adapter layer is switched off": any(layer.disable_adapters for layer in self._layers),
            "an adapter is merged into its base": any(layer.merged for layer in self._layers),
            "no token is supervised": supervised <= 0,
        }
        for fault, holds in faults.items():
            if holds:
                raise FenceError(f"before an optimizer step: {fault}", hint="the last checkpoint is good; please report this")

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Return the trained parameters in their fixed order."""
        return list(self._trained.values())

    @contextmanager
    def excursion(self, *, adapter_off: bool = False) -> Iterator[None]:
        """Lend the model to an evaluation and put everything back: modes, random numbers, what is trained.

        Random numbers are put back so that a run that evaluates more often trains on exactly the same numbers.
        """
        self.check()
        modes = [(module, module.training) for module in self._model.modules()]
        python, cpu = random.getstate(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._phase = _EXCURSION
        self._model.eval()
        try:
            with self._model.disable_adapter() if adapter_off else nullcontext():
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
            self._phase = _IDLE
        if list(trainable(self._model)) != list(self._trained):
            raise FenceError("an evaluation changed which tensors are trained")

"""What an evaluation may change in a model that it borrows, taken down before and put back after."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from qlora_tui.engine.load import Loaded


@dataclass(frozen=True, slots=True)
class ModelState:
    """How a model stands; the fields are named as a person would say what differs."""

    training_modes: tuple[bool, ...]
    trained_tensors: tuple[bool, ...]
    switched_off_adapters: tuple[bool, ...]
    active_adapters: tuple[tuple[str, ...], ...]
    merged_adapters: tuple[tuple[str, ...], ...]
    recomputation: tuple[Any, ...]
    use_cache: bool
    gradients: int
    switches: tuple[Any, ...]


class Lent:
    """A model and everything about it that is taken down; its parts are listed once, at the start."""

    def __init__(self, loaded: Loaded) -> None:
        """List the parts."""
        self.model = loaded.model
        self._modules = list(loaded.model.modules())
        self._parameters = list(loaded.model.parameters())
        self._adapted = [module for module in self._modules if isinstance(module, LoraLayer)]
        layers = loaded.decoder.layers
        assert isinstance(layers, torch.nn.ModuleList)
        self._layers = list(layers)
        self._config = loaded.model.get_base_model().config

    def now(self) -> ModelState:
        """Return how the model stands; some hundred microseconds for a model of a few hundred layers."""
        return ModelState(
            tuple(module.training for module in self._modules),
            tuple(parameter.requires_grad for parameter in self._parameters),
            tuple(layer.disable_adapters for layer in self._adapted),
            tuple(tuple(layer.active_adapters) for layer in self._adapted),
            tuple(tuple(layer.merged_adapters) for layer in self._adapted),
            tuple(layer.forward for layer in self._layers),
            bool(self._config.use_cache),
            sum(parameter.grad is not None for parameter in self._parameters),
            switches(),
        )

    def restore(self, state: ModelState) -> None:
        """Put everything back that can be; merged weights, gradients and torch's switches are for `difference` to find."""
        for layer, off, active in zip(self._adapted, state.switched_off_adapters, state.active_adapters, strict=True):
            if tuple(layer.active_adapters) != active:
                layer.set_adapter(list(active))
            if layer.disable_adapters != off:
                layer.enable_adapters(not off)
        for parameter, asks in zip(self._parameters, state.trained_tensors, strict=True):
            if parameter.requires_grad != asks:
                parameter.requires_grad_(asks)
        for module, mode in zip(self._modules, state.training_modes, strict=True):
            module.training = mode
        for layer, forward in zip(self._layers, state.recomputation, strict=True):
            if layer.forward != forward:
                layer.forward = forward
        self._config.use_cache = state.use_cache

    def difference(self, before: ModelState, after: ModelState) -> str:
        """Name what differs, or return nothing."""
        parts = [(part.name, getattr(before, part.name) != getattr(after, part.name)) for part in fields(ModelState)]  # its own fields
        return ", ".join(name.replace("_", " ") for name, differs in parts if differs)


def switches() -> tuple[Any, ...]:
    """Return torch's switches that hold for the whole process: a second thread that sets one changes training's arithmetic."""
    cuda = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )

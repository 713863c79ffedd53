"""What a run holds in memory at each of its moments, item by item, with the formula of each in words."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.sizes import (
    LOGITS_PER_CHUNK,
    adapter_params,
    choose_optimizer,
    element_bytes,
    layer_bytes_per_token,
    optimizer_bytes,
    weight_bytes,
)
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.units import count, gib, percent

_GIB = 1 << 30
_CUDA_CONTEXT = int(0.88 * _GIB)  # nvidia-smi above the allocator's reserve: 0.87-0.88 GiB on an H100, 2026-11-25
_CPU_LIBRARIES = int(0.9 * _GIB)  # resident after loading a 135 M model, less its weights, 2026-11-25
_CUDA_SLACK = (0.25, int(0.6 * _GIB))  # reserved above allocated: 0.4-0.6 GiB on that card
_CPU_SLACK = (0.65, 1 << 62)  # resident above live: the C library keeps freed blocks between live ones; 135 M, 4 x 512, same day
_LOADING_AT_ONCE = 4  # tensors in full width while a 4-bit base is loaded


@dataclass(frozen=True, slots=True)
class Item:
    """One part of the memory, and how its size comes about."""

    name: str
    bytes: int
    how: str


class Moments:
    """The pieces of one estimate; each moment of a run is a tuple of items of the same names."""

    def __init__(self, model: ModelSpec, run: RunConfig, machine: Machine, longest: int | None) -> None:
        self.model, self.run, self.machine = model, run, machine
        self.width = element_bytes(run, machine)
        self.length = min(run.max_length, longest or run.max_length)
        self.rows = run.per_device_train_batch_size
        self.tokens = self.rows * self.length
        self.params = adapter_params(model, run)

    def loading(self) -> tuple[Item, ...]:
        """The base arrives; nothing is trained yet."""
        largest = _LOADING_AT_ONCE * self._largest() * self.width if self.run.method == "qlora" else 0
        return self._items(
            workspace=(largest, f"{_LOADING_AT_ONCE} of the largest layers in full width while they are quantized"), state=False
        )

    def at_loss(self) -> tuple[Item, ...]:
        """Logits exist: everything kept for the backward pass is there, no layer is recomputed."""
        size, how = self._loss(copies=8, gradients=3)
        return self._items(activations=self._kept(), loss=(size, how))

    def at_backward(self) -> tuple[Item, ...]:
        """The last layer is recomputed and its gradients flow."""
        kept, how = self._kept()
        if self.run.gradient_checkpointing:
            layer = self.tokens * layer_bytes_per_token(self.model, self.run, self.width, self.length)
            kept, how = kept + layer, f"{how}; and all of the layer being recomputed"
        hidden, inner = self.model.hidden_size, self.model.intermediate_size
        flowing = self.tokens * self.width * (2 * inner + 2 * hidden)
        return self._items(
            activations=(kept, how),
            loss=(self.tokens * hidden * self.width, "gradient of the last hidden states"),
            workspace=(flowing + self._dequantized(), "gradients on their way through one layer, and its largest weight in full width"),
        )

    def evaluating(self) -> tuple[Item, ...]:
        """The hold-out is measured; no gradient is kept."""
        hidden, inner = self.model.hidden_size, self.model.intermediate_size
        passing = self.tokens * (self.width * (2 * hidden + 3 * inner) + 4 * hidden)
        size, how = self._loss(copies=8, gradients=1)
        return self._items(
            activations=(passing, "one layer at a time, nothing is kept"),
            loss=(size, how),
            workspace=(self._dequantized(), "the largest weight in full width"),
        )

    def saving(self) -> tuple[Item, ...]:
        """A checkpoint is written."""
        copied = self.params * 4 * 3 if self.machine.kind == "cpu" else 0
        return self._items(workspace=(copied, "a copy of the adapter and of the optimizer's state"))

    def _items(
        self,
        *,
        activations: tuple[int, str] = (0, "nothing is kept"),
        loss: tuple[int, str] = (0, "no logits"),
        workspace: tuple[int, str] = (0, "none"),
        state: bool = True,
    ) -> tuple[Item, ...]:
        cuda = self.machine.kind == "cuda"
        share, most = _CUDA_SLACK if cuda else _CPU_SLACK
        slack = min(most, int(share * (activations[0] + loss[0] + workspace[0])))
        context = (
            (_CUDA_CONTEXT, "CUDA's context and libraries, measured") if cuda else (_CPU_LIBRARIES, "Python, torch and their libraries")
        )
        state_sizes = (self.params * 4, self._optimizer()) if state else (0, (0, "not made yet"))
        return (
            Item("weights", weight_bytes(self.model, self.run, self.machine), self._weights_how()),
            Item("adapter", self.params * 4, f"{count(self.params)} weights of 4 bytes: rank {self.run.lora_r} x (inputs + outputs)"),
            Item("gradients", state_sizes[0], "4 bytes for each weight of the adapter"),
            Item("optimizer", *state_sizes[1]),
            Item("activations", *activations),
            Item("loss", *loss),
            Item("workspace", *workspace),
            Item(
                "allocator",
                slack,
                f"kept but not in use: {percent(share)} of what comes and goes{f', at most {gib(most)}' if cuda else ''}",
            ),
            Item("context", *context),
        )

    def _weights_how(self) -> str:
        rest = f"{count(self.model.params - self.model.linear_params)} of {self.width} bytes (embeddings, head, norms)"
        if self.run.method != "qlora":
            return f"{count(self.model.params)} weights of {self.width} bytes"
        bits = "0.516" if self.run.bnb_4bit_use_double_quant else "0.563"
        return f"{count(self.model.linear_params)} weights of {bits} bytes ({self.run.bnb_4bit_quant_type}) and {rest}"

    def _optimizer(self) -> tuple[int, str]:
        name = choose_optimizer(self.run, self.machine)
        size = optimizer_bytes(self.model, self.run, name)
        if name == "adamw_torch":
            return size, "AdamW: two numbers of 4 bytes for each weight of the adapter"
        return size, "8-bit AdamW: two bytes for each weight of the adapter, eight in tensors too small for it"

    def _kept(self) -> tuple[int, str]:
        """Return what the forward pass keeps for the backward pass."""
        layers, hidden = self.model.num_hidden_layers, self.model.hidden_size
        last = self.tokens * hidden * (4 + self.width)
        rows = f"{self.rows} x {count(self.length)} tokens"
        masks = 0 if self.model.plain_causal and self.run.attn_implementation == "sdpa" else self.rows * self.length**2 * self.width
        if self.run.gradient_checkpointing:
            kept = self.tokens * layers * hidden * self.width
            return kept + last + masks, f"{rows}: the input of each of {layers} layers"
        each = layer_bytes_per_token(self.model, self.run, self.width, self.length)
        return (
            self.tokens * layers * each + last + masks,
            f"{rows} x {layers} layers x {count(each)} bytes a token: all activations are kept",
        )

    def _loss(self, *, copies: int, gradients: int) -> tuple[int, str]:
        """Return the logits of one chunk and the hidden states around them; every token is taken to be supervised."""
        rows = min(self.tokens, max(1, LOGITS_PER_CHUNK // self.model.vocab_size))
        size = rows * self.model.vocab_size * copies + gradients * self.tokens * self.model.hidden_size * self.width
        return size, f"logits of {count(rows)} tokens x {count(self.model.vocab_size)} words at a time, and the hidden states' gradient"

    def _largest(self) -> int:
        return max(part.weights for part in self.model.linears())

    def _dequantized(self) -> int:
        return self._largest() * self.width if self.run.method == "qlora" else 0


def total(items: tuple[Item, ...]) -> int:
    """Return the bytes of all items together."""
    return sum(item.bytes for item in items)

"""What a run holds in memory at each of its moments, item by item, with the formula of each in words.

Merging an adapter into its base is no moment of a run: that is an export, done afterwards. A run loads,
trains, measures and saves, and the moments below are where each of these is largest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tui.engine.activations import Batch, Layer, Peak, final_norm, forward_peak, mask_bytes, norm_backward, stack
from qlora_tui.engine.fused import fused_layers
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.onebyte import narrow_gradients
from qlora_tui.engine.sizes import (
    LOGITS_PER_CHUNK,
    adapter_bytes,
    adapter_params,
    checkpointed_layers,
    choose_optimizer,
    constant_bytes,
    double_quantized,
    eight_bit,
    element_bytes,
    flat_params,
    four_bit,
    full_width_bytes,
    largest_linear,
    movable_bytes,
    offloaded_layers,
    optimizer_bytes,
    optimizer_room,
    quantized_bytes,
    update_groups,
    widened_bytes,
)
from qlora_tui.engine.spec import RunConfig, rows_at_once
from qlora_tui.engine.steptime import recordable
from qlora_tui.engine.units import count, gib, percent

_MIB, _GIB = 1 << 20, 1 << 30
_CUDA_CONTEXT = int(0.76 * _GIB)  # the driver's figure for the process above the allocator's: 0.74-0.77 GiB on an H100, 2026-11-27
# Reserved above allocated on that card, with blocks that grow: 65-730 MiB in 49 runs of 1.5 to 31 GiB; most where single
# tensors are large. Little runs keep little.
_CUDA_IDLE, _CUDA_IDLE_SHARE, _CUDA_MOST_IDLE = 100 * _MIB, 0.009, 0.6
# With fused layers, in 36 runs of 1.5 to 21 GiB on that card (2026-11-27): none to 200 MiB, and with three projections in one
# weight up to 970. That weight in full width is then many times what is kept of a layer, which lies down where it was.
_FUSED_IDLE, _FUSED_IDLE_SHARE = 64 * _MIB, 0.008
# On a processor: resident memory of four runs of a 135 M shape (1 x 512 to 4 x 512, all and no layers recomputed) on two
# cores, 2026-11-26, within 17 %. The C library keeps freed blocks, and products over the vocabulary pack their operands.
_CPU_LIBRARIES = int(0.6 * _GIB)
_CPU_SLACK, _CPU_LOSS_SLACK = 0.3, 2.3
_COMPILED = 430 * _MIB  # of the context: what torch's compiler brings for attention with capped scores, H200, 2026-11-27
_GRAPHS = 90 * _MIB  # of the context, at the first CUDA graph; one more MiB or so for each, same card
_CUBLAS = 2  # the thread of the forward pass and that of the backward pass keep a workspace each, on each stream

Sized = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Item:
    """One part of the memory, and how its size comes about."""

    name: str
    bytes: int
    how: str


COUNTED = frozenset(("weights", "embeddings", "adapter", "gradients", "optimizer"))
"""Items whose size follows from shapes alone; the others depend on kernels and on the allocator too."""


class Moments:
    """The pieces of one estimate; each moment of a run is a tuple of items of the same names."""

    def __init__(self, model: ModelSpec, run: RunConfig, machine: Machine, longest: int | None) -> None:
        self.model, self.run, self.machine = model, run, machine
        self.cuda = machine.kind == "cuda"
        self.graphs = self.cuda and run.cuda_graphs == "on" and recordable(run)
        self.width = element_bytes(run, machine)
        length = min(run.max_length, longest or run.max_length)
        kernels, fuses = (there and self.width == 2 for there in (machine.kernels, machine.fuses))
        narrow = narrow_gradients(model, run, machine)
        self.batch = Batch(model, run, self.width, rows_at_once(run), length, self.cuda, kernels, fuses, narrow)
        self.tokens = self.batch.tokens
        self.recomputed = checkpointed_layers(model, run)
        self.params = adapter_params(model, run)
        self.stack = stack(self.batch)
        self.masks = mask_bytes(self.batch)
        self.away = offloaded_layers(model, run) if self.cuda else 0  # a processor's RAM is where they are
        self.host_bytes = self.away * self.batch.hidden
        self.arriving = self.batch.hidden if self.away else 0
        self.inputs = (self.recomputed - self.away) * self.batch.hidden
        self.kept = self.inputs + self.stack.kept(self.recomputed) + self.masks
        self.fixed = self._fixed()

    def loading(self) -> tuple[Item, ...]:
        """The base arrives, a weight at a time; nothing is trained yet."""
        largest = largest_linear(self.model).weights
        size, how = 0, "weights arrive in the type they are kept in"
        if four_bit(self.model, self.run):
            size, how = largest * self.width + largest // 16, "the largest weight in full width while it is quantized"
        if eight_bit(self.model, self.run):
            size, how = largest * (self.width + 8), "the largest weight in full width and in 32 bits while it is quantized"
        if self.run.init_lora_weights == "pissa":
            size, how = max(size, largest * 4), "the largest weight in 32 bits, while PiSSA looks for its main directions"
        return self._items(workspace=(size, how), gradients=False, trained=False)

    def at_loss(self) -> tuple[Item, ...]:
        """Logits exist: everything kept for the backward pass is there, no layer is recomputed."""
        peak, how = self._logits(trained=True)
        return self._items(
            activations=(self.kept + final_norm(self.batch), self._kept_how()),
            loss=(peak.tensors, how),
            kernels=peak.kernels,
        )

    def at_norm(self) -> tuple[Item, ...]:
        """The gradient passes the norm after the last layer."""
        return self._items(
            activations=(self.kept + final_norm(self.batch), self._kept_how()),
            loss=(self.batch.hidden, "the gradient of the last hidden states"),
            workspace=(norm_backward(self.batch), "the gradient of the last norm, in 32 bits"),
        )

    def at_last_layer(self) -> tuple[Item, ...]:
        """The backward pass is in the last layer: nothing that the others keep is free yet."""
        last, beside = self.stack.number - 1, 0
        layer = self.stack.at(last)
        if self.recomputed == last:
            # Keeping the last layer saves its input, and nothing is lost by it; not counted, so that keeping more never looks smaller.
            beside, layer = self.batch.hidden, replace(layer, backward=max(layer.backward, layer.again, key=lambda peak: peak.bytes))
        beside += self.arriving if self.recomputed > last else 0
        return self._in_layer(self.kept + beside, layer, self.recomputed > last)

    def at_recomputed_layer(self) -> tuple[Item, ...]:
        """The backward pass has come to the last layer that is recomputed; the layers after it are done."""
        kept = self.inputs + self.arriving + self.masks
        return self._in_layer(kept, self.stack.at(self.recomputed - 1), True)

    def at_step(self) -> tuple[Item, ...]:
        """The optimizer works; activations are gone."""
        return self._items(workspace=(self._copies(), "the optimizer's own copies"))

    def training(self) -> list[tuple[Item, ...]]:
        """Return the moments of a step; the largest of them is its peak."""
        moments = [self.at_loss(), self.at_norm(), self.at_last_layer(), self.at_step()]
        if 0 < self.recomputed < self.stack.number:
            moments.append(self.at_recomputed_layer())
        return moments

    def evaluating(self) -> list[tuple[Item, ...]]:
        """Return the moments of a measurement of the hold-out; no gradient is kept."""
        passing = forward_peak(self.batch)
        peak, how = self._logits(trained=False)
        inside = self._items(activations=(passing.tensors + self.masks, "one layer at a time, nothing is kept"), gradients=False)
        measured = [inside, self._items(loss=(peak.tensors, how), kernels=peak.kernels, gradients=False)]
        return [*measured, *self.training()] if self.graphs else measured  # recorded batches keep their memory, and lend it

    def saving(self) -> tuple[Item, ...]:
        """A checkpoint is written; from a card it is copied to RAM tensor by tensor."""
        copied = 0 if self.cuda else max(self.params * 4, optimizer_bytes(self.model, self.run, choose_optimizer(self.run, self.machine)))
        return self._items(workspace=(copied, "a copy of the adapter, then of the optimizer's state"), gradients=False)

    def _in_layer(self, kept: int, layer: Layer, again: bool) -> tuple[Item, ...]:
        """The backward pass is inside `layer`, computed `again` or kept."""
        how = self._kept_how()
        if again:
            kept, how = kept + layer.kept - layer.shared, f"{how}; and all of the layer being recomputed"
        backward = layer.again if again else layer.backward
        flowing = max(backward.tensors, 0)
        return self._items(
            activations=(kept + min(backward.tensors, 0), how),
            workspace=(flowing, "gradients on their way through one layer, and its widest weight in full width"),
            kernels=backward.kernels,
        )

    def _items(
        self,
        *,
        activations: Sized = (0, "nothing is kept"),
        loss: Sized = (0, "no logits"),
        workspace: Sized = (0, "none"),
        kernels: int = 0,
        gradients: bool = True,
        trained: bool = True,
    ) -> tuple[Item, ...]:
        weights, parts, adapter, lent, optimizer, data, libraries, context = self.fixed
        slack, idle = self._slack(activations[0] + workspace[0], loss[0] + kernels)
        if self.graphs and activations[0]:  # their memory is apart, so that nothing of it is free for the optimizer
            workspace = (workspace[0] + self._copies(), workspace[1])
        return (
            weights,
            parts,
            adapter,
            lent if gradients else Item("gradients", 0, "none at this moment"),
            optimizer if trained else Item("optimizer", 0, "not made yet"),
            Item("activations", *activations),
            Item("loss", *loss),
            Item("workspace", *workspace),
            Item("kernels", kernels + libraries, "what kernels hold inside: matrix products, attention's backward pass, sums over words"),
            data,
            Item("allocator", slack, idle),
            context,
        )

    def _slack(self, passing: int, loss: int) -> Sized:
        """Return what is kept but not in use."""
        if self.cuda and self.batch.fused:
            moving, joined = passing + loss, 2 * self._widest() * self.model.fused
            kept = f", and twice the widest weight in full width ({gib(joined)})" if joined else ""
            how = f"kept but not in use: {gib(_FUSED_IDLE)} and {_FUSED_IDLE_SHARE:.1%} of what comes and goes{kept}"
            return int(min(_CUDA_MOST_IDLE * moving, _FUSED_IDLE + joined + _FUSED_IDLE_SHARE * moving)), how
        if self.cuda:
            moving = passing + loss
            largest = max(self.tokens * self.model.intermediate_size * (2 if self.model.fused else 1), self.batch.scores) * self.width
            share = f"{_CUDA_IDLE_SHARE:.1%} of what comes and goes"
            how = (
                f"kept but not in use: {gib(_CUDA_IDLE)}, one of the largest tensors and {share}, at most {percent(_CUDA_MOST_IDLE)} of it"
            )
            return int(min(_CUDA_MOST_IDLE * moving, _CUDA_IDLE + largest + _CUDA_IDLE_SHARE * moving)), how
        return int(_CPU_SLACK * passing + _CPU_LOSS_SLACK * loss), "freed blocks that the C library keeps, and what products pack"

    def _widest(self) -> int:
        """Return the bytes of the largest weight in full width, if the base is held in fewer bits."""
        return max(widened_bytes(self.model, self.run, part, self.width, at_once=True) for part in self.model.linears())

    def _fixed(self) -> tuple[Item, Item, Item, Item, Item, Item, int, Item]:
        """Return what is the same at every moment; the last number is what libraries hold for themselves."""
        model, run = self.model, self.run
        name = choose_optimizer(run, self.machine)
        ids = self.tokens * 24 + self.batch.length * model.head_dim * 2 * self.width
        each = (32 if (self.machine.compute_capability or (8, 0)) >= (9, 0) else 8) * _MIB
        workspace = _CUBLAS * each * (1 + self.graphs) if self.cuda else 0
        compiled = not model.sdpa and fused_layers(model, run, self.batch.fuses)
        context = _CUDA_CONTEXT + _GRAPHS * self.graphs + _COMPILED * compiled
        held = (context, "CUDA's context and libraries, measured") if self.cuda else (_CPU_LIBRARIES, "Python, torch and libraries")
        return (
            Item("weights", *self._weights()),
            Item("embeddings", *self._parts()),
            Item("adapter", adapter_bytes(model, run, self.width), self._adapter_how()),
            Item("gradients", 4 * flat_params(model, run), "4 bytes for each weight of the adapter, while a step lasts"),
            Item("optimizer", optimizer_room(model, run, name), self._optimizer_how(name)),
            Item("data", ids, f"{count(self.tokens)} tokens, their places and labels, 8 bytes each"),
            workspace,
            Item("context", *held),
        )

    def _weights(self) -> Sized:
        model, run = self.model, self.run
        if eight_bit(model, run):
            return quantized_bytes(model, run), f"{count(model.quantized_params)} weights of one byte, and 4 bytes for each output"
        if not four_bit(model, run):
            return model.linear_params * self.width, f"{count(model.linear_params)} weights of the layers, {self.width} bytes each"
        kind = model.quantized or run.bnb_4bit_quant_type
        twice = "quantized too" if double_quantized(model, run) else "4 bytes for 64 weights"
        constants = gib(model.quantized_params * constant_bytes(model, run))
        how = f"{count(model.quantized_params)} weights of half a byte ({kind}), and {constants} of block constants ({twice})"
        return quantized_bytes(model, run), how

    def _parts(self) -> Sized:
        size = full_width_bytes(self.model, self.run, self.machine)
        if not (four_bit(self.model, self.run) or eight_bit(self.model, self.run)):
            size -= self.model.linear_params * self.width
        head = "embeddings, which are the head too" if self.model.tie_word_embeddings else "embeddings, head"
        return size, f"{count(size // self.width)} weights of {self.width} bytes: {head}, norms, biases"

    def _adapter_how(self) -> str:
        dora = ", and a length for each output" if self.run.use_dora else ""
        padded = ", each tensor rounded up to 256" if flat_params(self.model, self.run) > self.params else ""
        return f"{count(self.params)} weights of 4 bytes: rank {self.run.lora_r} x (inputs + outputs){dora}{padded}"

    def _optimizer_how(self, name: str) -> str:
        if name == "adamw_torch":
            return "AdamW: two numbers of 4 bytes for each weight of the adapter"
        how = "8-bit AdamW: two bytes for each weight of the adapter, eight in tensors too small for it"
        movable = movable_bytes(self.model, self.run, name) if self.cuda else 0
        return f"{how}; {gib(movable)} of it may move to RAM when the card is full" if movable else how

    def _copies(self) -> int:
        """Return what the plain optimizer copies while it works."""
        if choose_optimizer(self.run, self.machine) != "adamw_torch":
            return 0
        at_once = max(numbers for numbers, _ in update_groups(self.model, self.run, "adamw_torch"))
        return 4 * at_once * (1 if self.cuda else 2)  # on a processor one more, while a root is divided

    def _kept_how(self) -> str:
        """Say what the forward pass keeps for the backward pass."""
        total, again = self.stack.number, self.recomputed
        rows = f"{self.batch.rows} x {count(self.batch.length)} tokens"
        if self.run.packing == "on":
            rows = f"{count(self.tokens)} tokens of {self.batch.rows} rows end to end"
        each = self.stack.at(total - 1).kept // self.tokens
        if self.away:
            kept = f", and all of {total - again}" if again < total else ""
            return f"{rows}: the inputs of two layers; those of {self.away} wait in RAM{kept}"
        if again == total:
            return f"{rows}: the input of each of {total} layers"
        if not again:
            return f"{rows} x {total} layers x {count(each)} bytes a token: all activations are kept"
        return f"{rows}: the input of {again} layers, and all of {total - again}, {count(each)} bytes a token"

    def _logits(self, *, trained: bool) -> tuple[Peak, str]:
        """Return the logits of one chunk and the hidden states around them; every token is taken to be supervised."""
        words, width = self.model.vocab_size, self.width
        rows = min(self.tokens, self.run.loss_chunk_size or max(1, LOGITS_PER_CHUNK // words))
        narrow = width if width < 4 else 0  # logits are made in the type of computation, then widened
        each = 4 + narrow
        if trained and not self.model.sdpa:
            each = 8  # capped logits: their slope too
        at_once = self.batch.kernels  # the loss is read off the logits, and its gradient takes their place
        if at_once:
            each = width
        around = 2 * self.batch.hidden + (rows * self.model.hidden_size * width if trained and not at_once else 0)
        how = f"logits of {count(rows)} tokens x {count(words)} words at a time, and hidden states around them"
        return Peak(rows * words * each + around, 0 if at_once else rows * words * max(0, 8 - each)), how


def total(items: tuple[Item, ...]) -> int:
    """Return the bytes of all items together."""
    return sum(item.bytes for item in items)


def corrected(items: tuple[Item, ...], bias: float) -> tuple[Item, ...]:
    """Return `items` so that their total is `bias` times what it was; what is counted exactly stays as it is.

    The rest takes the difference, but never less than half of it stays: a larger one would be a fault, not a bias.
    """
    exact = sum(item.bytes for item in items if item.name in COUNTED)
    rest = total(items) - exact
    factor = max(0.5, (total(items) * bias - exact) / rest) if rest else 1.0
    return tuple(item if item.name in COUNTED else replace(item, bytes=int(item.bytes * factor)) for item in items)

"""What a fused decoder layer keeps for its backward pass, and its peak there: the memory of `fast.layers`, in arithmetic.

Where `activations` follows transformers' thirty operations a layer, this follows the four that stand in their place on a
card: of a norm its input and its rows' rates are kept, the MLP's inner product takes the place of its gradient, and of a layer that is
computed again the MLP's two wide products exist a tile at a time. `tests/loop/test_peaks.py` holds it to a trace of every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qlora_tui.engine.families import has_kernels
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.models import Linear, ModelSpec
from qlora_tui.engine.onebyte import turned_bytes
from qlora_tui.engine.sizes import element_bytes, widened_bytes
from qlora_tui.engine.spec import RunConfig

_QKV, GATED = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")

TILE = 4096
"""Tokens of a recomputed layer's MLP in flight at once; the same figure as in `fast.operations`. A test compares them."""

WIDEST_SUM, ROWS_OF_A_SUM = 32, 512
"""The highest rank whose gradients the gate's kernel sums on its way, and the rows of one sum; the same figures as in `fast.gate`."""

_RATE = 4
"""Bytes of what a norm multiplied a row by, which is kept instead of the norm."""

WIDEST_ROW = 1 << 14
"""The widest hidden size that a norm's kernel holds; the same figure as in `fast.kernels`."""

WIDEST_HEAD = 256
"""The widest head that torch's flash kernel takes; it also wants a multiple of 8."""


def fused_layers(model: ModelSpec, run: RunConfig, fuses: bool) -> bool:
    """Say whether a model's layers are fused: where the device `fuses` any, for its family, attention and adapter.

    Those are a family with a form in `fast.layers`, fused attention, and an adapter without dropout and lengths of its own.
    """
    plain = not run.use_dora and not run.lora_dropout and run.attn_implementation == "sdpa"
    covered = has_kernels(model.family, model.wrapper) and model.hidden_size <= WIDEST_ROW
    return run.fused_layers != "off" and fuses and plain and covered


def multiplied_rank(run: RunConfig) -> int:
    """Return the rank of what is multiplied: PiSSA's start goes beside the adapter, in one product."""
    return run.lora_r * (2 if run.init_lora_weights == "pissa" else 1)


def has_scoreless(model: ModelSpec, run: RunConfig, machine: Machine) -> bool:
    """Say whether `attn_implementation = "sdpa"` exists for `model` here: of capped scores it is what fused layers do."""
    asked = replace(run, attn_implementation="sdpa")
    return model.sdpa or fused_layers(model, asked, machine.fuses and element_bytes(run, machine) == 2)


def unpacked_because(model: ModelSpec, run: RunConfig, fuses: bool) -> str:
    """Return why rows of `model` cannot lie end to end; an empty text where they can: fused layers keep them apart, and no others."""
    if run.fused_layers == "off":
        return "fused_layers is off"
    if not fuses:
        return "fused layers compute in bfloat16, on a CUDA card"
    if not fused_layers(model, run, fuses):
        return f"layers of {model.family} with this adapter and attention are not fused"
    if has_flash(model):
        return ""
    return f"its heads are {model.head_dim} wide: the flash kernel takes multiples of 8 up to {WIDEST_HEAD}, none of 200 to 224"


def has_flash(model: ModelSpec) -> bool:
    """Say whether fused layers need no mask, for windows neither: flash takes the heads, or the kernel is the one for capped scores."""
    return not model.sdpa or flash_takes(model.head_dim)


def flash_takes(size: int) -> bool:
    """Say whether torch's flash kernel trains heads of `size`: multiples of 8 up to 256, not 200 to 224, which consumer cards refuse."""
    return size % 8 == 0 and size <= WIDEST_HEAD and not 192 < size <= 224


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One fused layer of one micro-batch; all sizes in bytes.

    `repeated` are its keys, or values, as attention takes them, `scores` what attention keeps beside its output, and `kernel` what
    its backward pass holds inside. `narrow`: what gradients of inputs are multiplied in, if not in 16 bits.
    """

    model: ModelSpec
    run: RunConfig
    tokens: int
    width: int
    repeated: int
    scores: int
    kernel: int
    narrow: str = ""

    def attention(self) -> int:
        """Return what is kept for everything but the MLP's products: both inputs, queries, keys, values and attention's output."""
        kept = 2 * self._hidden() + 2 * self._query() + 2 * self.repeated + self.scores + self._low(*_QKV, "o_proj") + _RATE * self.tokens
        if self.model.qk_norm:
            kept += self._query() + self._keys()
        return kept + (2 * self._hidden() if self._sandwich() else 0)

    def mlp(self, tokens: int = 0) -> int:
        """Return what the MLP's two wide products of `tokens`, else of all, take with their low-rank parts: a kept layer keeps them."""
        whole = 2 * self._inner() + self._low(*GATED, "down_proj") + _RATE * self.tokens
        return whole * (tokens or self.tokens) // self.tokens

    def before_gradients(self) -> int:
        """Return what the first layer keeps less: where attention's products have no adapter, nothing before them needs a gradient."""
        targets = {part.name for part in self.model.targeted(self.run.lora_target_modules)}
        if targets & set(_QKV):
            return 0
        early = self.attention() - (0 if self._sandwich() else self._hidden())
        return early - (self._query() + self._low("o_proj") if "o_proj" in targets else 0)

    def backward(self) -> list[tuple[int, int]]:
        """Return what each stage of a kept layer's backward pass holds beyond what is kept: in tensors, and inside kernels."""
        return [(self._down(self.tokens, normed=False), 0), (self._up(self.tokens, normed=False), 0), *self._early()]

    def again(self) -> list[tuple[int, int]]:
        """Return the same for a layer that was computed again; its wide products were not kept, so they are taken off."""
        if self._sandwich():
            return self.backward()
        tokens = min(self.tokens, TILE)
        wide = self.mlp(tokens) - self.mlp()
        return [(self._down(tokens, normed=True) + wide, 0), (self._up(tokens, normed=True) + wide, 0), *self._early()]

    def forward(self) -> int:
        """Return the most that a layer holds in a forward pass that keeps nothing: the embeddings and its input are there all along."""
        tokens = min(self.tokens, TILE)
        share = self.model.intermediate_size * tokens * self.width
        small = self._hidden() * tokens // self.tokens
        mlp = max(2 * share + self._widened(*GATED) + small, 3 * share, share + self._widened("down_proj"))
        attention = self._hidden() + 2 * self._query() + 2 * self._keys()
        return 2 * self._hidden() + max(2 * self._hidden() + mlp, attention)

    def _early(self) -> list[tuple[int, int]]:
        """The stages after the MLP, whose wide products are free by then: attention's output, attention itself, its products."""
        gone = self.mlp() + (2 if self._sandwich() else 1) * self._hidden()
        flowing = self._query() + 2 * self.repeated
        output = 2 * self._hidden() + self._query() + self._turned(self.tokens, "o_proj")
        within = self._hidden() + self._query() + flowing
        products = 3 * self._hidden() + self._query() + 2 * self._keys() + self._turned(self.tokens, *_QKV) - 2 * self._query()
        return [(output - gone, 0), (within - gone, self.kernel), (products - gone, 0)]

    def _down(self, tokens: int, *, normed: bool) -> int:
        """The inner product's gradient is made: beside the gradient that came and the one to be, the third weight.

        In the weight's place come the sums of which the gate makes the adapters' gradients. Where the wide products are made again, the
        norm that they were made of (`normed`) is there too.
        """
        share = (self.model.hidden_size * normed + self.model.intermediate_size) * tokens * self.width
        sums = (-(-tokens // ROWS_OF_A_SUM) + 1) * self._sum() + self._low("down_proj") * tokens // self.tokens
        beside = max(self._turned(tokens, "down_proj"), sums) + self._before(tokens)
        return 2 * self._hidden() + share + beside + self._adapters(*GATED, "down_proj")

    def _up(self, tokens: int, *, normed: bool) -> int:
        """The gradient of the MLP's input is made from both wide ones; those of the adapters wait, and what they were made from."""
        names = (*GATED, "down_proj")
        waiting = 2 * self._adapters(*names) + 2 * self._low(*GATED) * tokens // self.tokens + self._sum() + self._before(tokens)
        return 2 * self._hidden() + (1 + normed) * self.model.hidden_size * tokens * self.width + self._turned(tokens, *GATED) + waiting

    def _before(self, tokens: int) -> int:
        """Return the adapters' gradients of the tiles before, where there is more than one: in 32 bits."""
        return 0 if tokens == self.tokens else 4 * self._adapters(*GATED, "down_proj") // self.width

    def _sum(self) -> int:
        """Return the gradients that the gate sums, in 32 bits: of the B's before it and the A after it."""
        if multiplied_rank(self.run) > WIDEST_SUM:
            return 0
        parts = [part for part in self.model.targeted(self.run.lora_target_modules) if part.name in (*GATED, "down_proj")]
        return 4 * multiplied_rank(self.run) * sum(part.inputs if part.name == "down_proj" else part.outputs for part in parts)

    def _adapters(self, *names: str) -> int:
        """Return the adapters of modules called `names` as they are multiplied."""
        parts = [part for part in self.model.targeted(self.run.lora_target_modules) if part.name in names]
        return self.width * multiplied_rank(self.run) * sum(part.inputs + part.outputs for part in parts)

    def _sandwich(self) -> bool:
        return self.model.norms_per_layer > 2

    def _hidden(self) -> int:
        return self.tokens * self.model.hidden_size * self.width

    def _query(self) -> int:
        return self.tokens * self.model.query_size * self.width

    def _keys(self) -> int:
        return self.tokens * self.model.key_value_size * self.width

    def _inner(self) -> int:
        return self.tokens * self.model.intermediate_size * self.width

    def _low(self, *names: str) -> int:
        count = sum(part.name in names for part in self.model.targeted(self.run.lora_target_modules))
        return self.tokens * self.width * multiplied_rank(self.run) * count

    def _turned(self, tokens: int, *names: str) -> int:
        """Return what gradients of inputs of those called `names` take: the largest weight widened, or turned at a byte a weight.

        In FP8 the sum's next part is beside it from the second on.
        """
        if not self.narrow:
            return self._widened(*names)
        made = tokens * self.width * (self.narrow == "fp8")
        return max(
            (turned_bytes(part, tokens, self.narrow) + made * part.inputs * (place > 0) for place, part in enumerate(self._named(*names))),
            default=0,
        )

    def _widened(self, *names: str) -> int:
        """Return the largest weight of those called `names` in full width, if the base is held in fewer bits."""
        return max((widened_bytes(self.model, self.run, part, self.width, at_once=True) for part in self._named(*names)), default=0)

    def _named(self, *names: str) -> list[Linear]:
        return [part for part in self.model.linears() if part.name in names]

"""The time of one step as arithmetic: what the device computes and moves, and what its host does meanwhile.

A micro-batch costs products, attention, element-wise traffic, dequantization and the loss on the device; its host
spends about as long on each kernel, whatever the kernel does, so its time is a count of launches. The two run side
by side: the slower one decides, and where they are alike each waits for the other now and then.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from qlora_tui.engine.cards import Card
from qlora_tui.engine.fused import GATED, ROWS_OF_A_SUM, TILE, WIDEST_SUM, fused_layers, multiplied_rank
from qlora_tui.engine.machine import Machine, card_of
from qlora_tui.engine.measured import Speed
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.onebyte import narrow_gradients
from qlora_tui.engine.sizes import (
    LOGITS_PER_CHUNK,
    adapter_params,
    double_quantized,
    eight_bit,
    element_bytes,
    four_bit,
)
from qlora_tui.engine.spec import RunConfig, offloads, rows_per_step

_MATMUL_SHARE = 0.75  # of the data sheet's products that large ones reach: 765-780 of 989 TFLOP/s on an H100, 2026-11-25
_MEMORY_SHARE = 0.88  # of the bandwidth that a large copy reaches
# The next five were fitted together to 32 settings of 0.5 to 14 B on an H100, replayed as CUDA graphs so that no host was in
# the way, attention's to rows of up to 65,536 tokens on an H200 (2026-11-27): within 10 %.
_PRODUCT_SHARE = 0.92  # of the seconds that products would take at the measured rate
_MOVE_SHARE = 0.54  # of a large copy's rate that a layer's many element-wise kernels reach
_ATTENTION_SHARE = 0.69  # of large products' rate that fused attention reaches
_CAPPED_SHARE = 0.098  # the same of attention with capped scores, which torch compiles: Gemma 2's of 2 B, recorded on an H200, 2026-11-28
# Scores that are held are moved 16 times an element's width forward and 23 back, capped ones six and seven times more, by a large copy's
# rate or, where they are small, within the card's cache. As the other kernels' rate counts, eight settings recorded on an H200
# (2026-11-28) took these: within 9 %, and one of 0.5 B was predicted 17 % too long.
_SCORE_PASSES, _CAP_PASSES = (9.0, 13.0), (3.0, 4.0)
_KERNEL_SECONDS = 3e-6  # of a card between one kernel and the next
_LOGIT_PASSES = 17.5  # times an element's width that one logit is moved: product, float32, softmax, gradient, product
_DEQUANT_SHARE = 0.8  # of the bandwidth that widening of 4-bit weights reaches: 35 GB in 12.6 ms on an H100, 2026-11-27
# The next five were fitted to 36 settings of fused layers, 0.5 to 14 B, recorded on an H200, and to 22 of an 8 B model there and on an
# H100, up to 65,536 tokens (2026-11-27): within 6.2 %, median 1.9 %. Without one half of the 36, that half is met within 12 %, median 3 %.
# The rate is of 48 settings with an 8-bit base and rows end to end (H200, 2026-11-28): fitted to every other one, it meets the others
# within 7.6 %, median 2 %. Since then the gate's backward kernel is faster and a norm is made less often; it was not fitted again.
_FUSED_PRODUCT_SHARE = 1.1  # of the seconds that products would take at the measured rate
_FUSED_KERNEL_SECONDS = 2.5e-6  # of a card between one kernel and the next
_FUSED_MOVE_SHARE = 0.78  # of a large copy's rate that fused kernels and low-rank products reach together
_FUSED_LOGIT_PASSES = 5.3  # the loss is read off the logits, and its gradient takes their place
_AGAIN_SHARE = 1.08  # of a fused layer's traffic when it is made again, tile by tile
_LAUNCH_SECONDS = 25e-6  # of a host that nobody measured: 10e-6 is a fast desktop, 35e-6 a virtual machine
_FLOAT32_SHARE = 0.125  # of 16-bit products that 32-bit ones reach on a card that has tensor cores for 16 bits
_CORE_FLOPS = 34e9  # of one CPU core, 4-bit and float32: SmolLM2-135M at about 100 tokens/s on two cores
_UPDATE_LAUNCHES = 12  # of norm, clipping and AdamW over what lies in one buffer; waits for the device are not counted
_CHUNK_LAUNCHES = 17  # of one chunk of the loss
_MORE_LAUNCHES = 1.05  # of what is counted with few tokens: large products come in parts
_OVERLAP = 6  # how sharply the slower of device and host decides: 1 would add them up, without end the slower alone counts
_GRAPHS_PAY = 0.25  # of the device's seconds that the host needs, from where a recorded step is worth its rounded lengths:
# one that was reckoned to need under half took longer than the card (8 B, all recomputed, an H100, 2026-11-27)
_BUS_BYTES = 12e9  # a second between card and pinned RAM, each way: PCIe 3.0 with 16 lanes; 4.0 and 5.0 reach two and four times that
_SHARED = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}  # read one input
_DEQUANT_BYTES = 2.5  # of one weight: half a byte read, two written
_EIGHT_BIT_BYTES = 3  # of one weight: read as a byte, written in 16 bits
_EIGHT_BIT_PLAIN_BYTES = 23  # the same without our kernel, twice through 32 bits
_NARROW_SHARE = 0.58  # of 16-bit products' seconds that FP8's take: 94 of 155 ms and 173 of 313 on an H100, 2026-11-25; of a card that
# was not timed, INT8's too
_TURNED_BYTES = 2  # of one weight: read and written the other way round
_OPTIMIZER_BYTES = 30  # of one adapter weight: norm, clipping, two states and the weight itself


def card_speed(card: Card) -> Speed:
    """Return what `card` should reach, from its data sheet and the shares that an H100 reached."""
    return Speed(card.flops * _MATMUL_SHARE, card.bandwidth_bytes * _MEMORY_SHARE, card.bandwidth_bytes * _DEQUANT_SHARE, _LAUNCH_SECONDS)


def table_speed(machine: Machine) -> Speed | None:
    """Return what a device should reach before anything was measured on it; None for a card that is not in the table.

    On a processor products decide, and what it reaches in them already counts the rest.
    """
    if machine.kind == "cpu":
        return Speed(_CORE_FLOPS * max(machine.cores, 1), math.inf, math.inf, 0.0)
    card = card_of(machine)
    return None if card is None else card_speed(card)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Seconds of a forward and a backward pass over some rows, and what each recomputed layer adds to them."""

    device_seconds: float
    host_seconds: float
    again_device_seconds: float
    again_host_seconds: float
    graphs: str = "off"

    def seconds(self, recomputed: int) -> float:
        """Return the seconds of one micro-batch in which so many layers run forward once more."""
        device, host = self._both(recomputed)
        if self.replayed(recomputed):
            return device
        slower = max(device, host)
        both = (device / slower) ** _OVERLAP + (host / slower) ** _OVERLAP
        return slower * math.pow(both, 1 / _OVERLAP)

    def replayed(self, recomputed: int) -> bool:
        """Say whether it is recorded and replayed as a CUDA graph: if asked for, or where its host would take a quarter of its time."""
        device, host = self._both(recomputed)
        return self.graphs == "on" or (self.graphs == "auto" and host > _GRAPHS_PAY * device)

    def _both(self, recomputed: int) -> tuple[float, float]:
        device = self.device_seconds + recomputed * self.again_device_seconds
        return device, self.host_seconds + recomputed * self.again_host_seconds


@functools.lru_cache(maxsize=256)
def micro_batch(model: ModelSpec, run: RunConfig, machine: Machine, speed: Speed, rows: int, tokens: float) -> MicroBatch:
    """Return the time of one micro-batch.

    Args:
        model: the base's shape.
        run: the settings; how many layers are recomputed and the rows at once are taken from the arguments.
        machine: the device; decides the width of a number.
        speed: what the device reaches.
        rows: rows at once.
        tokens: tokens of each row; long ones cost more a token, since attention reads all before.

    Raises:
        ConfigError: `lora_target_modules` names a layer that the model does not have.
    """
    width, cuda = element_bytes(run, machine), machine.kind == "cuda"
    kernels = machine.kernels and width == 2
    flops = _product_flops(machine, speed, width)
    weights = sum(part.weights for part in model.linears())
    batch = rows * tokens
    # a few tokens wait for the weights to be read, many for the products
    fused, narrow = fused_layers(model, run, machine.fuses and width == 2), narrow_gradients(model, run, machine)
    share = (_FUSED_PRODUCT_SHARE if fused else _PRODUCT_SHARE) if cuda else 1.0
    frozen, low = 2.0 * weights * batch / flops * share, 2.0 * _low_rank(model, run) * batch / flops
    products = max(frozen, weights * width / speed.bandwidth_bytes) + low
    gradients = max(frozen * _narrow_share(speed, narrow), weights / speed.bandwidth_bytes) + low if narrow else products
    there, back = _fused_moves(model, run, width, narrow) if fused else _moves(model, run, width, tokens)
    rate = speed.bandwidth_bytes * (_FUSED_MOVE_SHARE if fused else _MOVE_SHARE)
    full = back_full = _full_weights(model, run, width, speed, kernels=kernels)
    if narrow:
        back += _narrow_moves(model, narrow)
        back_full = weights * _TURNED_BYTES / (speed.bandwidth_bytes * _FUSED_MOVE_SHARE)
    attention = batch * _attention(model, tokens) / (flops * _attention_rate(model, fused=fused))
    forward = products + attention + batch * there / rate + full
    backward = gradients + low + 2.5 * attention + batch * back / rate + back_full
    once_more = forward
    if fused and model.norms_per_layer == 2:
        third, tiled = _again_shares(model, batch)
        once_more = (products + full) * (1 - third) + tiled * full + attention + batch * there / rate * _AGAIN_SHARE
    layers = model.num_hidden_layers
    chunk = run.loss_chunk_size or max(1, LOGITS_PER_CHUNK // model.vocab_size)
    chunks = math.ceil(batch / chunk)
    head = 2 * model.vocab_size * model.hidden_size
    loss = max(2.0 * head * batch / flops * share, chunks * head * width / speed.bandwidth_bytes)
    passes = _FUSED_LOGIT_PASSES / _FUSED_MOVE_SHARE if kernels else _LOGIT_PASSES / _MOVE_SHARE
    loss += batch * model.vocab_size * passes * width / speed.bandwidth_bytes
    again, both = launches(model, run, fused=fused, narrow=bool(narrow))
    copied = batch * model.hidden_size * width / _BUS_BYTES if cuda and offloads(run) else 0.0
    # beside a layer's pass forward, and both in the backward
    stalled = max(0.0, copied - forward) + max(0.0, copied - once_more - backward)
    started, again_started = (layers * both + chunks * _CHUNK_LAUNCHES) * _MORE_LAUNCHES, again * _MORE_LAUNCHES
    between = (_FUSED_KERNEL_SECONDS if fused else _KERNEL_SECONDS) if cuda else 0.0
    return MicroBatch(
        device_seconds=layers * (forward + backward) + loss + started * between,
        host_seconds=started * speed.launch_seconds,
        again_device_seconds=once_more + again_started * between + stalled,
        again_host_seconds=again_started * speed.launch_seconds,
        graphs=run.cuda_graphs if cuda and recordable(run) else "off",
    )


def _again_shares(model: ModelSpec, batch: float) -> tuple[float, float]:
    """Return which share of a fused layer's products is not made again, and how often all weights are widened for more than one tile.

    The third product of the MLP is not made again, nor widened. Of each further tile's MLP three weights are widened forward and five
    backward.
    """
    weights = sum(part.weights for part in model.linears())
    shares = {part.name: part.weights / weights for part in model.linears()}
    mlp = shares["down_proj"] + sum(shares.get(name, 0.0) for name in GATED)
    return shares["down_proj"], (math.ceil(batch / TILE) - 1) * mlp * 8 / 3


def sees_whole_rows(model: ModelSpec, run: RunConfig, longest: int) -> bool:
    """Say whether a fused kernel attends in every layer, and sees the whole of a row: then no mask is needed."""
    return run.attn_implementation == "sdpa" and model.sdpa and (model.sliding_window is None or longest < model.sliding_window)


def recordable(run: RunConfig) -> bool:
    """Say whether a micro-batch can be recorded as a CUDA graph: whatever draws no random numbers can."""
    return not run.lora_dropout


def launches(model: ModelSpec, run: RunConfig, *, fused: bool, narrow: bool = False) -> tuple[int, int]:
    """Return the kernels that one layer starts when it is computed again, and in a forward and a backward pass together.

    Counted with torch's profiler on an H100 for 17 settings of five shapes (2026-11-27): to 0.2 % for four, 6 % too low
    for one. A norm is six operations, an adapted module casts A and B, multiplies three times forward and five times
    backward, and its 4-bit base is widened in three steps (in one where its constants are plain).
    """
    parts, targeted = model.linears(), model.targeted(run.lora_target_modules)
    if fused:
        return _fused_launches(model, run, narrow=narrow)
    widened = (3 if double_quantized(model, run) else 1) * len(parts) if four_bit(model, run) else len(parts) * eight_bit(model, run)
    turned = 3 * len(parts) if narrow else widened  # a gradient is quantized, a weight turned, and whole sums are scaled
    forward = 20 + 6.5 * model.norms_per_layer + 18 * model.qk_norm + len(parts) + 4 * len(targeted) + widened
    backward = 45 + 15 * model.norms_per_layer + 30 * model.qk_norm + len(parts) + 11 * len(targeted) + turned
    if run.lora_dropout:
        forward, backward = forward + 2 * len(targeted), backward + 2 * len(targeted)
    if run.use_dora:
        forward, backward = forward + (15 + widened // len(parts)) * len(targeted), backward + 6 * len(targeted)
    if run.attn_implementation == "eager" or not model.sdpa:
        forward, backward = forward + 8, backward + 8
    return round(forward), round(forward + backward)


def _fused_launches(model: ModelSpec, run: RunConfig, *, narrow: bool) -> tuple[int, int]:
    """Return the same of a fused layer, counted from `fast.layers` and `fast.adapted`.

    An 8 B model's step has 3,879 kernels on an H100 (2026-11-28); an H200 splits more sums.
    Of each group of modules that share an input, adapters are cast, multiplied, and their gradients added in one kernel each; of each
    module its part is written forward and multiplied twice backward, where a card often splits the sum and clears room for it first.
    Of an input that a norm made the slope is scaled, and A's gradient, in place of the norm.
    """
    parts, targeted, sandwich = model.linears(), model.targeted(run.lora_target_modules), model.norms_per_layer > 2
    groups = len({_SHARED.get(part.name, part.name) for part in targeted})
    added = sum(_SHARED.get(part.name) != "mlp" for part in targeted)  # the gate's kernel adds the parts of gate and up
    products = (2 if four_bit(model, run) or eight_bit(model, run) else 1) * len(parts)
    gradients = 4 * len(parts) if narrow else products  # a gradient is quantized, a weight turned, and sums are added up
    heads = 2 * model.qk_norm
    there = (4 if sandwich else 2) + model.norms_per_layer + products + 2 * groups + added + heads
    scaled = groups - sum(part.name in ("o_proj", "down_proj") for part in targeted)  # A's gradient is made of what a norm read
    norms = model.norms_per_layer + 2 * scaled
    back = (9 if multiplied_rank(run) <= WIDEST_SUM else 11) + norms + gradients + 4 * groups + 5 * len(targeted) + heads
    return there if sandwich else there + 4, there + back


def optimizer_seconds(model: ModelSpec, run: RunConfig, speed: Speed) -> float:
    """Return the time of one update of the adapter: a few kernels over all of it, whatever the number of its tensors."""
    return adapter_params(model, run) * _OPTIMIZER_BYTES / speed.bandwidth_bytes + _UPDATE_LAUNCHES * speed.launch_seconds


def attention_share(model: ModelSpec, run: RunConfig, machine: Machine, speed: Speed, tokens: float) -> float:
    """Return the share of a long row's time that goes to attention, the only part that grows with its square."""
    fused = fused_layers(model, run, machine.fuses and element_bytes(run, machine) == 2)
    flops = speed.matmul_flops * _attention_rate(model, fused=fused)
    attention = 4.5 * model.num_hidden_layers * tokens * _attention(model, tokens) / flops
    return min(1.0, attention / micro_batch(model, run, machine, speed, 1, tokens).seconds(model.num_hidden_layers))


def micro_batches(run: RunConfig, rows: int) -> int:
    """Return how many micro-batches of `rows` rows an optimizer step has."""
    return math.ceil(rows_per_step(run) / rows)


def _product_flops(machine: Machine, speed: Speed, width: int) -> float:
    """Return what products reach: in 32 bits on a card with tensor cores for 16 far less than the 16-bit one that was measured."""
    return speed.matmul_flops * (_FLOAT32_SHARE if machine.kind == "cuda" and width == 4 and (machine.bf16 or machine.half) else 1.0)


def _attention(model: ModelSpec, tokens: float) -> float:
    """Return the operations of one token in one layer's attention: two products with what it sees, half the row on average.

    A window is full from its own length on; of layers of two kinds it is their mean.
    """
    window, whole_share = model.sliding_window, 1 / model.whole_every if model.whole_every else 0.0
    if window is None or window >= tokens:
        window, whole_share = 0, 1.0
    seen = whole_share * tokens + (1 - whole_share) * window * (2.0 - window / tokens)
    return 2.0 * model.query_size * seen


def _attention_rate(model: ModelSpec, *, fused: bool) -> float:
    """Return what attention reaches of large products' rate; where transformers refuses flash, a fused layer's scores are capped."""
    return _CAPPED_SHARE if fused and not model.sdpa else _ATTENTION_SHARE


def _low_rank(model: ModelSpec, run: RunConfig) -> int:
    return sum(run.lora_r * (part.inputs + part.outputs) for part in model.targeted(run.lora_target_modules))


def _moves(model: ModelSpec, run: RunConfig, width: int, tokens: float) -> tuple[float, float]:
    """Return the bytes that element-wise work moves for one token and one layer, forward and backward.

    Counted from the operations, each reading and writing once: norms are made of six in 32 bits, an adapter
    adds to every output, the gated MLP multiplies twice, positions turn queries and keys.
    """
    targeted = model.targeted(run.lora_target_modules)
    norms = 15 * (model.norms_per_layer * model.hidden_size + (model.query_size + model.key_value_size) * model.qk_norm)
    adapter = sum(part.inputs * (3 if run.lora_dropout else 1) + part.outputs * (4 if run.use_dora else 2) for part in targeted)
    copied = 3 * (2 * model.intermediate_size + model.query_size + 2 * model.key_value_size) * model.fused  # taken apart, and joined again
    rest = copied + 5 * model.intermediate_size + 6 * model.hidden_size + 6 * (model.query_size + model.key_value_size)
    scores = model.num_attention_heads * tokens if run.attn_implementation == "eager" or not model.sdpa else 0.0
    forward, backward = (
        norms + adapter + rest + scores * (passes + more * (not model.sdpa))
        for passes, more in zip(_SCORE_PASSES, _CAP_PASSES, strict=True)
    )
    return width * forward, width * backward


def _fused_moves(model: ModelSpec, run: RunConfig, width: int, narrow: str) -> tuple[float, float]:
    """Return the same of fused layers: each kernel reads and writes once, and low-rank products read what they share once.

    What adapters add is written before the product is, which adds itself to it; only FP8's is added to. The gate's kernels add theirs
    on the way, and sum the gradients of the adapters beside them; nobody reads their product then.
    """
    targeted, rank = model.targeted(run.lora_target_modules), multiplied_rank(run)
    hidden, inner, turned = model.hidden_size, model.intermediate_size, 2 * (model.query_size + model.key_value_size)
    outputs = sum(part.outputs for part in targeted)
    added = sum(part.outputs for part in targeted if _SHARED.get(part.name) != "mlp")
    inputs = {_SHARED.get(part.name, part.name): part.inputs for part in targeted}
    wide = inputs.pop("down_proj", 0)
    sandwich, summed = model.norms_per_layer > 2, rank <= WIDEST_SUM
    turned *= 2 if model.qk_norm else 1
    forward = (8 if sandwich else 6) * hidden + 6 * hidden * sandwich + added + sum(inputs.values()) + wide + turned + 3 * inner
    backward = 12 * hidden + 8 * hidden * sandwich + (3 if narrow == "fp8" else 2) * sum(inputs.values()) + turned
    if summed:
        sums = (outputs - added + wide) * rank * 4 * 2 / ROWS_OF_A_SUM
        return width * forward, width * (backward + outputs + added + (5 if wide else 6) * inner) + sums
    return width * forward, width * (backward + 2 * outputs + wide + 6 * inner)


def _narrow_share(speed: Speed, kind: str) -> float:
    """Return the share of 16-bit products' seconds that those in `kind` take: as measured, else as on an H100."""
    return (speed.fp8_share if kind == "fp8" else speed.int8_share) or _NARROW_SHARE


def _narrow_moves(model: ModelSpec, kind: str) -> float:
    """Return the bytes that 8 bits add to a token's way back through a layer: gradients are quantized, those of one input summed apart.

    FP8's sums come in 16 bits; INT8's are whole numbers of 32, written by the product and read by who scales them.
    """
    parts = model.linears()
    shared = sum(part.inputs for part in parts if part.name in _SHARED) - 2 * model.hidden_size * (not model.fused)
    summed = 2 * 3 * shared if kind == "fp8" else 2 * 4 * sum(part.inputs for part in parts) + 2 * 2 * shared
    return 3 * sum(part.outputs for part in parts) + summed


def _full_weights(model: ModelSpec, run: RunConfig, width: int, speed: Speed, *, kernels: bool) -> float:
    """Return the seconds that one layer's weights take as a whole, whatever the batch: made from fewer bits, measured for DoRA."""
    small = model.quantized_params / model.num_hidden_layers if four_bit(model, run) else 0.0
    seconds = small * _DEQUANT_BYTES / speed.dequant_bytes
    if eight_bit(model, run):
        moved = _EIGHT_BIT_BYTES / _FUSED_MOVE_SHARE if kernels else _EIGHT_BIT_PLAIN_BYTES
        seconds = model.quantized_params / model.num_hidden_layers * moved / speed.bandwidth_bytes
    if run.use_dora:  # the base is made whole once more, for the length of every row of it with its adapter
        targeted = sum(part.weights for part in model.targeted(run.lora_target_modules))
        seconds += seconds + targeted * 4 * width / (speed.bandwidth_bytes * _MOVE_SHARE)
    return seconds

"""The worst batch first: the longest rows go through a whole step and an evaluation before step 1, and are measured.

What will not fit ends here and not after an hour, and what a step takes is measured before anybody waits for it.
A rehearsal leaves no trace: weights, optimizer, gradients and random numbers are put back to the last bit, so a run
with it and one without it give the same adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes.functional as bnb
import torch

from qlora_tui.engine import evaluate
from qlora_tui.engine.batches import longest, supervised_tokens
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.events import Phase
from qlora_tui.engine.fast import eightbit
from qlora_tui.engine.fast.base import widened
from qlora_tui.engine.fast.eightbit import Kind
from qlora_tui.engine.fast.recompute import recomputed
from qlora_tui.engine.load import Loaded, choose_dtype, trainable
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.measured import Speed
from qlora_tui.engine.meter import Meter, RandomState, empty_cache, out_of_memory
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.steptime import launches

_LAST_MADE = ("exp_avg_sq", "absmax2", "state2")  # of an optimizer's state, the tensor that is made last, by kind
_PARTS = 4
_WIDE = (4096, 4096, 8192)  # tokens, inputs, outputs of a product that fills any card
_WIDENED = 1 << 26  # weights: their kernel takes longer than its launch
_COPIED_BYTES = 1 << 27  # larger than any cache of a card
_NF4_BYTES = 2.5  # read and written for each weight that is dequantized to 16 bits
_FEW_TOKENS = 8
_NEVER = 1e9  # times as long: no planner takes it
_REPEATS, _BACK_TO_BACK = 4, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who takes part in a rehearsal.

    Attributes:
        loaded: the model with its adapter.
        optimizer: fresh; it is fresh again afterwards.
        train_rows, eval_rows: all of them; the longest are chosen here.
        add: adds the gradient of rows, as a step does, divided by a number of supervised tokens.
        clear: takes the gradients back, as the end of a step does.
        rows_at_once: of training and of evaluation, at the moment they are asked for.
        warm: micro-batches before the clock counts: one, and one more where batches are recorded at their second sight.
        repeats: micro-batches of one step; a second one meets the gradients of the first, which is where a step peaks.
        chunk: tokens of the loss at once.
        excursion: lends the model to an evaluation.
        beside: the context in which a batch of it is measured.
        poll: called between parts; may raise.
    """

    loaded: Loaded
    optimizer: torch.optim.Optimizer
    train_rows: Sequence[TokenRow]
    eval_rows: Sequence[TokenRow]
    add: Callable[[Sequence[TokenRow], int], object]
    clear: Callable[[], None]
    rows_at_once: int
    warm: int
    repeats: int
    chunk: int
    excursion: Callable[[], AbstractContextManager[None]]
    beside: evaluate.Beside
    poll: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What was measured: `peaks` in bytes of "train" and "eval", `seconds` of "train" (one micro-batch), "optimizer" and "eval".

    `tokens` are the real ones of that micro-batch of `rows` rows.
    """

    peaks: Mapping[str, int]
    seconds: Mapping[str, float]
    rows: int
    tokens: int

    @property
    def seconds_per_token(self) -> float:
        """Return the seconds of one real token of a long step; the optimizer's part is small there and left out."""
        return self.seconds["train"] / self.tokens


def rehearse(cast: Cast, meter: Meter) -> Generator[Phase, None, Rehearsed]:
    """Run the longest micro-batch through forward, backward and optimizer, then the longest evaluation batch.

    A step and its state are made once unmeasured by the clock (kernels are chosen, the optimizer's state is made),
    then timed. The peaks land in `meter` as phases "probe" and "probe eval".

    Raises:
        torch.OutOfMemoryError: it does not fit; everything is put back all the same.
        Stopped: somebody asked to stop.
    """
    began = time.monotonic()
    rows = longest(cast.train_rows, cast.rows_at_once)
    held_out = longest(cast.eval_rows, cast.rows_at_once)
    tokens = sum(len(row.input_ids) for row in rows)
    yield Phase("probe", "begin", done=0, total=_PARTS, note=f"the longest batch first: {len(rows)} rows, {len(rows[0].input_ids)} tokens")
    seconds: dict[str, float] = {}
    with _untouched(cast):
        with meter.phase("probe", fresh=True):
            _step(cast, rows, cast.warm)
            yield _progress(cast, 1)
            seconds["train"] = _timed(cast, lambda: _gradients(cast, rows, min(2, cast.repeats))) / min(2, cast.repeats)
            yield _progress(cast, 2)
            seconds["optimizer"] = _timed(cast, cast.optimizer.step)
            cast.clear()
        yield _progress(cast, 3)
        with meter.phase("probe eval", fresh=True):
            seconds["eval"] = _timed(cast, lambda: _evaluate(cast, held_out))
    peaks = {"train": meter.peaks["probe"], "eval": meter.peaks["probe eval"]}
    told = meter.told("probe", predicted="train")
    yield Phase("probe", "end", done=_PARTS, total=_PARTS, seconds=time.monotonic() - began, **told)
    return Rehearsed(peaks, seconds, len(rows), tokens)


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Put the state of `optimizer` back to what its first step would make, in place.

    It is emptied and not dropped: bitsandbytes never frees a paged buffer, so a second one would stay beside the
    first. Its quantization maps are shared constants and stay. State that was only half made, because memory ran
    out on the way, is dropped.
    """
    for parameter, state in list(optimizer.state.items()):
        eight_bit = "state1" in state and state["state1"].dtype == torch.uint8
        last = [name for name in _LAST_MADE if name != "state2" or not eight_bit]
        if not any(name in state for name in last):
            del optimizer.state[parameter]
            continue
        for name, value in state.items():
            state[name] = _emptied(name, value)


def pieces(loaded: Loaded, spec: ModelSpec, run: RunConfig, machine: Machine) -> Speed | None:
    """Measure what a step is made of on this card, in under two seconds; None where not even that fits.

    A large product in 16 and in 8 bits, a copy, weights from 4 bits to 16, and how long the host takes for one kernel. From these the
    planner predicts settings and models that nobody has tried. Like a rehearsal it leaves no trace, and it belongs
    before step 1: gradients are dropped. All in the type that this card computes in as a rule, whatever this run computes in.
    """
    device, dtype = loaded.device, choose_dtype(replace(run, dtype="auto"), machine)
    random_state = RandomState.now()
    try:
        with torch.no_grad():
            return Speed(
                matmul_flops=_matmul_flops(device, dtype),
                bandwidth_bytes=_bandwidth(device),
                dequant_bytes=_dequantization(device, dtype),
                launch_seconds=_launch_seconds(loaded, spec, run),
                **{f"{kind}_share": _narrow_share(device, dtype, kind) for kind in machine.narrow},
            )
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    finally:
        random_state.restore()
        empty_cache(loaded.device)


def _step(cast: Cast, rows: Sequence[TokenRow], times: int) -> None:
    _gradients(cast, rows, times)
    cast.optimizer.step()
    cast.clear()


def _gradients(cast: Cast, rows: Sequence[TokenRow], times: int) -> None:
    supervised = times * sum(supervised_tokens(row) for row in rows)
    for _ in range(times):
        cast.poll()
        cast.add(rows, supervised)
    grads = [parameter.grad for parameter in trainable(cast.loaded.model).values() if parameter.grad is not None]
    torch.nn.utils.get_total_norm(grads)  # a step looks at it, and it takes memory of its own


def _evaluate(cast: Cast, rows: Sequence[TokenRow]) -> None:
    if not rows:
        return
    with cast.excursion():
        for _ in evaluate.measure(cast.loaded, rows, len(rows), cast.poll, chunk=cast.chunk, beside=cast.beside):
            pass


@contextmanager
def _untouched(cast: Cast) -> Iterator[None]:
    """Put weights, optimizer, gradients and random numbers back whatever happens inside.

    The weights wait in RAM: a copy on the card would be measured as if the run needed it. Putting back allocates nothing.
    """
    parameters = list(trainable(cast.loaded.model).values())
    weights = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    random_state = RandomState.now()
    try:
        yield
    finally:
        cast.clear()
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        _wait(cast.loaded.device)  # paged state is emptied where it lies, and its last step must be over
        reset_optimizer(cast.optimizer)
        _wait(cast.loaded.device)
        random_state.restore()


def _emptied(name: str, value: Any) -> Any:
    if name.startswith("qmap"):
        return value
    if not isinstance(value, torch.Tensor):
        return 0 if name == "step" else value
    if getattr(value, "is_paged", False):  # bitsandbytes marks its managed buffers; filled on the card, they need not travel
        bnb.fill(value, 0)
        return value
    return value.zero_()


def _progress(cast: Cast, done: int) -> Phase:
    cast.poll()
    return Phase("probe", "progress", done=done, total=_PARTS)


def _timed(cast: Cast, work: Callable[[], object]) -> float:
    return _seconds(cast.loaded.device, work)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long `work` takes until the device has done it."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _best(device: torch.device, work: Callable[[], object]) -> float:
    """Return the device's seconds for `work`: done many times over, so that its host is ahead; the shortest of a few tries."""

    def often() -> None:
        for _ in range(_BACK_TO_BACK):
            work()

    often()
    return min(_seconds(device, often) for _ in range(_REPEATS)) / _BACK_TO_BACK


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a product large enough to be the best that this card does."""
    tokens, inputs, outputs = _WIDE
    x_TI = torch.randn(tokens, inputs, device=device, dtype=dtype)
    w_OI = torch.randn(outputs, inputs, device=device, dtype=dtype)
    return 2 * tokens * inputs * outputs / _best(device, lambda: torch.nn.functional.linear(x_TI, w_OI))


def _narrow_share(device: torch.device, dtype: torch.dtype, kind: Kind) -> float:
    """Return the share of a 16-bit product's seconds that an input's gradient in `kind` takes; endless where it is refused."""
    tokens, inputs, outputs = _WIDE
    grad_TO = torch.randn(tokens, outputs, device=device, dtype=dtype)
    weight_OI = torch.randn(outputs, inputs, device=device, dtype=dtype)
    held, turned = (
        torch.randint(-127, 128, shape, device=device, dtype=torch.int8).to(eightbit.TYPES[kind])
        for shape in ((tokens, outputs), (inputs, outputs))
    )
    rows = eightbit.Rows(held, torch.ones(tokens, device=device))
    try:
        narrow = _best(device, lambda: eightbit.narrow_product(rows, turned, dtype))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return _NEVER  # a library may have no such product for a card that could make it
    return narrow / _best(device, lambda: grad_TO @ weight_OI)


def _bandwidth(device: torch.device) -> float:
    """Return bytes a second of an element-wise kernel, read and written."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _best(device, lambda: target.copy_(source))


def _dequantization(device: torch.device, dtype: torch.dtype) -> float:
    """Return bytes a second of bringing 4-bit weights to the type of computation, read and written."""
    weight = torch.randn(_WIDENED, device=device, dtype=dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    del weight
    return _NF4_BYTES * _WIDENED / _best(device, lambda: widened(packed, state))


def _launch_seconds(loaded: Loaded, spec: ModelSpec, run: RunConfig) -> float:
    """Return the host's seconds for one kernel: a whole forward and backward over a few tokens, by its count of launches.

    The clock stops when everything is handed over, before the device is done; with so few tokens it is seldom behind.
    The shortest of a few tries counts: whatever else a host does makes one longer, and medians were 7 to 61 % too long
    for the steps that followed (an H200's host of 64 cores, four runs at once). A recomputed layer runs forward twice.
    Gradients are dropped.
    """
    layers = loaded.decoder.layers
    assert isinstance(layers, torch.nn.ModuleList)
    forward, both = launches(spec, run, fused=not loaded.why_plain)
    ids_BT = torch.zeros(1, _FEW_TOKENS, dtype=torch.long, device=loaded.device)
    taken = []
    try:
        with torch.enable_grad():
            for _ in range(_REPEATS + 1):
                _wait(loaded.device)
                began = time.perf_counter()
                loaded.hidden(ids_BT).sum().backward()
                taken.append(time.perf_counter() - began)
    finally:
        for parameter in trainable(loaded.model).values():
            parameter.grad = None
    return min(taken[1:]) / (len(layers) * both + recomputed(layers) * forward)

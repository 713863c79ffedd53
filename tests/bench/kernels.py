"""The Triton kernels of `engine/fast/kernels.py` alone, beside bitsandbytes', Liger's where it is installed, and torch's plain ones.

usage: python -m tests.bench.kernels [--tokens 4096] [--cpu]

One JSON line a kernel: milliseconds (median of 50), GB/s by the bytes that the operation has to move once, and their share of the
card's bandwidth, measured by copying 1 GiB. `--cpu` runs tiny shapes of what runs there, bitsandbytes and torch; it measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".pkg"))

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

EPS = 1e-5
OURS = "qlora_tui.engine.fast.kernels"
Timed = tuple[str, str, int, Callable[[], object]]


def median_seconds(work: Callable[[], object], *, cpu: bool) -> float:
    """Return the median of 50 runs after 10; each is timed by the device, whose clock does not see the launch."""
    seconds = []
    for turn in range(3 if cpu else 60):
        if cpu:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if turn >= 10:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def ours(cpu: bool) -> Any:
    """Return our kernels, or None where they cannot run: on a processor, and where Triton is missing."""
    if cpu or importlib.util.find_spec("triton") is None or importlib.util.find_spec(OURS) is None:
        return None
    return importlib.import_module(OURS)


def dequantizations(mine: Any, wide: int, inner: int, device: str) -> Iterator[Timed]:
    """NF4, double quantized, to bf16: half a byte read and two written a weight, and the scales."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(inner, wide, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    moved = weight.numel() * 2 + packed.numel() + weight.numel() // 64
    yield "dequantize", "bitsandbytes", moved, lambda: dequantize_4bit(packed, state)
    if mine:
        from qlora_tui.engine.fast import widths

        yield "dequantize", "ours", moved, lambda: widths.dequantize(packed, state)


def norms(mine: Any, tokens: int, wide: int, device: str) -> Iterator[Timed]:
    """RMSNorm: forward reads and writes the activations once; backward reads two and writes one."""
    x = torch.randn(tokens, wide, device=device, dtype=torch.bfloat16)
    dy, weight = torch.randn_like(x), torch.randn(wide, device=device, dtype=torch.bfloat16)
    moved = 2 * x.numel() * 2
    yield "rms_norm", "torch", moved, lambda: functional.rms_norm(x, (wide,), weight, EPS)
    yield "rms_norm_backward", "torch", moved * 3 // 2, backward(lambda leaf: functional.rms_norm(leaf, (wide,), weight, EPS), x, dy)
    if mine:
        yield "rms_norm", "ours", moved, lambda: mine.rms_norm(x, weight, EPS)
        yield "rms_norm_backward", "ours", moved * 3 // 2, lambda: mine.rms_norm_backward(dy, x, weight, EPS)
    if liger(device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        def norm(leaf: torch.Tensor) -> torch.Tensor:
            return LigerRMSNormFunction.apply(leaf, weight, EPS, 0.0, "llama", False)

        yield "rms_norm", "liger", moved, lambda: norm(x)
        yield "rms_norm_backward", "liger", moved * 3 // 2, backward(norm, x, dy)


def gates(mine: Any, tokens: int, inner: int, device: str) -> Iterator[Timed]:
    """SwiGLU: forward reads two and writes one; backward reads three and writes two, ours three, since it makes h again."""
    gate = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
    up, dh = torch.randn_like(gate), torch.randn_like(gate)
    one = gate.numel() * 2
    yield "swiglu", "torch", 3 * one, lambda: functional.silu(gate) * up
    yield "swiglu_backward", "torch", 5 * one, backward(lambda leaf, other: functional.silu(leaf) * other, gate, dh, up)
    if mine:
        from qlora_tui.engine.fast import gate as room
        from qlora_tui.engine.fast.lora import Part

        written = [part.clone() for part in (dh, gate, up)]  # it writes over what it is given; other numbers cost the same
        low, b = torch.randn_like(gate[:, :16]), torch.randn(inner, 16, device=device, dtype=torch.bfloat16)
        parts, beside = (Part(low, b, 1.0), Part(low, b, 1.0)), (low, b.t().contiguous())
        yield "swiglu", "ours", 3 * one, lambda: room.gated(gate, up, "silu")
        yield "swiglu with adapters", "ours", 3 * one, lambda: room.gated(gate, up, "silu", parts)
        yield "swiglu_backward", "ours", 6 * one, lambda: room.gated_backward_(*written, "silu", product=True)
        yield "swiglu_backward with adapters", "ours", 5 * one, lambda: room.gated_backward_(*written, "silu", parts, beside, product=False)
    if liger(device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        yield "swiglu", "liger", 3 * one, lambda: LigerSiLUMulFunction.apply(gate, up)
        yield "swiglu_backward", "liger", 5 * one, backward(LigerSiLUMulFunction.apply, gate, dh, up)


def products(tokens: int, wide: int, inner: int, device: str) -> Iterator[Timed]:
    """A frozen product and what its adapter of rank 16 adds to it, by torch; the large ones are held up by operations, not by bytes.

    `deeper` and `wider` have the adapter's numbers inside the product: beside the weight's, and so beside the input's or its gradient's.
    """

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    more, rank = 64, 16
    x, weight, grad, residual = made(tokens, wide + more), made(inner, wide + more), made(tokens, inner), made(tokens, inner)
    narrow, frozen, low, a, b = (
        x[:, :wide].contiguous(),
        weight[:, :wide].contiguous(),
        made(tokens, rank),
        made(rank, wide),
        made(inner, rank),
    )
    large, left, right = 2 * (narrow.numel() + frozen.numel() + grad.numel()), 2 * narrow.numel(), 2 * grad.numel()
    yield "product", "torch", large, lambda: narrow @ frozen.t()
    yield "product and a residual", "torch", large + right, lambda: torch.addmm(residual, narrow, frozen.t())
    yield "product, 64 deeper", "torch", large, lambda: x @ weight.t()
    yield "gradient of its input", "torch", large, lambda: grad @ frozen
    yield "gradient of its input, 64 wider", "torch", large, lambda: grad @ weight
    yield "adapter: x A", "torch", left, lambda: narrow @ a.t()
    yield "adapter: added", "torch", 2 * right, lambda: residual.addmm_(low, b.t(), beta=0.5)
    yield "adapter: slope", "torch", right, lambda: grad @ b
    yield "adapter: gradient of A", "torch", left, lambda: low.t() @ narrow
    yield "adapter: gradient of B", "torch", right, lambda: grad.t() @ low
    yield "adapter: gradient of x", "torch", 2 * left, lambda: narrow.addmm_(low, a, beta=0.5)


def narrowings(mine: Any, tokens: int, wide: int, inner: int, device: str) -> Iterator[Timed]:
    """Gradients in 8 bits, read once and written at half the width; a weight's bytes turned, and widened to 16 bits."""
    from qlora_tui.engine.fast import eightbit
    from qlora_tui.engine.machine import look

    x, times = torch.randn(tokens, wide, device=device, dtype=torch.bfloat16), torch.rand(wide, device=device)
    held, scales = torch.zeros(inner, wide, device=device, dtype=torch.int8), torch.rand(inner, device=device)
    yield "quantize", "torch", 3 * x.numel(), lambda: eightbit.quantize(x * times, "fp8")
    yield "turned", "torch", 2 * held.numel(), lambda: held.t().contiguous()
    yield "widen 8 bits", "torch", 3 * held.numel(), lambda: (held * scales[:, None]).bfloat16()
    if mine and (kinds := look().narrow):
        from qlora_tui.engine.fast import widths

        kind, wide16 = kinds[0], torch.randn(inner, wide, device=device, dtype=x.dtype)
        grad = torch.randn(tokens, inner, device=device, dtype=x.dtype)
        yield "gradient of an input", "16bit", 2 * (grad.numel() + held.numel() + x.numel()), lambda: grad @ wide16
        for each in kinds:
            rows, turned = eightbit.quantize(grad, each), widths.turned(held, each)
            once = grad.numel() + held.numel() + (2 if each == "fp8" else 4) * x.numel()
            yield "gradient of an input", each, once, functools.partial(eightbit.narrow_product, rows, turned, x.dtype)

        yield "quantize", "ours", 3 * x.numel(), lambda: widths.quantize(x, times, kind)
        yield "turned", "ours", 2 * held.numel(), lambda: widths.turned(held, kind)
        sums = torch.zeros(tokens, inner, device=device, dtype=torch.int32)
        yield "scale whole sums", "ours", 6 * sums.numel(), lambda: widths.summed(sums, x.float()[:, 0], x.dtype)
        yield "widen 8 bits", "ours", 3 * held.numel(), lambda: widths.scaled(held, scales, x.dtype)


def losses(mine: Any, tokens: int, words: int, device: str) -> Iterator[Timed]:
    """Cross-entropy of a chunk of logits, and their gradient: each read twice and written once."""
    logits = torch.randn(tokens, words, device=device, dtype=torch.bfloat16)
    labels = torch.zeros(tokens, dtype=torch.long, device=device)

    def plain() -> None:
        leaf = logits.detach().requires_grad_()
        functional.cross_entropy(leaf.float(), labels, reduction="sum").backward()

    yield "loss", "torch", 3 * 2 * logits.numel(), plain
    if mine:
        yield "loss", "ours", 3 * 2 * logits.numel(), lambda: mine.cross_entropy_(logits, labels, None, gradient=True)


def rotations(mine: Any, tokens: int, heads: int, shared: int, device: str) -> Iterator[Timed]:
    """Rotary positions of queries and keys of 128 numbers: each read and written once."""
    q = torch.randn(1, tokens, heads, 128, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, tokens, shared, 128, device=device, dtype=torch.bfloat16)
    angles = torch.outer(torch.arange(tokens, device=device), 500_000.0 ** -(torch.arange(64, device=device) / 64)).repeat(1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    moved = 2 * 2 * (q.numel() + k.numel())
    yield "rotate", "torch", moved, lambda: [rotated(x, cos, sin) for x in (q, k)]
    if mine:
        yield "rotate", "ours", moved, lambda: [mine.turn_heads(x[0], cos, sin) for x in (q, k)]
    if liger(device):
        from liger_kernel.ops.rope import LigerRopeFunction

        yield "rotate", "liger", moved, lambda: LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None])


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [B, T, H, D] rotated as transformers does it, in torch's plain operations."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[None, :, None] + torch.cat((-high, low), dim=-1) * sin[None, :, None]


def backward(operation: Callable[..., torch.Tensor], leaf: torch.Tensor, dy: torch.Tensor, *others: torch.Tensor) -> Callable[[], object]:
    """Return the backward of `operation` alone: its forward is done once, here. Every input gets a gradient.

    A kernel that writes over what it was given computes other numbers the second time, at the same cost.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (leaf, *others)]
    y = operation(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def liger(device: str) -> bool:
    """Say whether Liger's kernels can run here."""
    return device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def copied(device: str, *, cpu: bool) -> float:
    """Return the bytes a second, read and written, of copying 1 GiB."""
    source = torch.zeros((1 << 20) if cpu else (1 << 30), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), cpu=cpu)


def main() -> int:
    """Time every kernel and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    cpu = options.cpu
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: --cpu runs the same code on tiny shapes")
    device = "cpu" if cpu else "cuda"
    tokens, wide, inner, heads, shared = (64, 128, 256, 4, 2) if cpu else (options.tokens, 4096, 14_336, 32, 8)
    bandwidth = copied(device, cpu=cpu)
    mine = ours(cpu)
    name = "CPU" if cpu else torch.cuda.get_device_name()
    print(json.dumps({"device": name, "torch": torch.__version__, "tokens": tokens, "bandwidth_gb_s": round(bandwidth / 1e9)}), flush=True)
    if mine is None:
        print(f"skipped: ours: {OURS} needs CUDA and Triton", flush=True)
    work = (
        *dequantizations(mine, wide, inner, device),
        *norms(mine, tokens, wide, device),
        *gates(mine, tokens, inner, device),
        *products(tokens, wide, inner, device),
        *narrowings(mine, tokens, wide, inner, device),
        *losses(mine, 32 if cpu else 512, 320 if cpu else 128_256, device),
        *rotations(mine, tokens, heads, shared, device),
    )
    for kernel, whose, moved, call in work:
        seconds = median_seconds(call, cpu=cpu)
        rate = moved / seconds
        line = {
            "kernel": kernel,
            "of": whose,
            "ms": round(seconds * 1e3, 4),
            "gb_s": round(rate / 1e9, 1),
            "share": round(rate / bandwidth, 3),
        }
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

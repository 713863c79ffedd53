"""Attention with capped scores on a CUDA device: the compiled kernel against scores that are made whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters

from qlora_tui.engine.batches import blocks_of
from qlora_tui.engine.fast import softcap

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def parts_of(rows: int, length: int, size: int, heads: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    numbers = (heads[0], heads[1], heads[1])
    return [torch.randn(rows, length, number, size, device=CUDA, dtype=torch.bfloat16).mul_(3).requires_grad_() for number in numbers]


@pytest.fixture(scope="module", params=[128, 256])
def size(request: pytest.FixtureRequest) -> int:
    """The size of a head, for which the kernel is compiled once."""
    found: int = request.param
    assert softcap.why_not(CUDA, (8, 4), found, found**-0.5, 5.0) == ""
    return found


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("lengths", [[700], [1], [255, 1, 300, 77], [128] * 4, []], ids=str)
def test_outputs_and_gradients_are_as_close_to_32_bits_as_whole_scores(size: int, window: int | None, lengths: list[int]) -> None:
    rows, length = (1, sum(lengths)) if lengths else (3, 333)
    blocks = blocks_of(lengths, CUDA) if lengths else None
    scale, cap = size**-0.5, 5.0
    parts = parts_of(rows, length, size, (8, 4))
    ours = softcap.attend(*parts, blocks, window, scale, cap)
    slope = torch.randn_like(ours)
    found = (ours, *torch.autograd.grad(ours, parts, slope))

    bounds = torch.tensor([0, length], device=CUDA, dtype=torch.int32) if blocks is None else blocks.bounds
    at = torch.arange(length, device=CUDA)
    seen = softcap.tiles_of(bounds, length, window).mask_mod(0, 0, at[:, None], at)
    mask = torch.zeros(length, length, device=CUDA).masked_fill_(~seen, -math.inf)

    def whole(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        copies = [part.detach().to(dtype).requires_grad_() for part in parts]
        out = softcap.attend(*copies, None, None, scale, cap, mask)
        return (out, *torch.autograd.grad(out, copies, slope.to(dtype)))

    for mine, rough, exact in zip(found, whole(torch.bfloat16), whole(torch.float32), strict=True):
        nothing = 1e-5 * math.sqrt(exact.numel())  # a token that sees itself alone has no gradient of its score: what is left is rounding
        assert (mine - exact).norm() < 1.25 * (rough - exact).norm() + 1e-3 * exact.norm() + nothing


def test_a_change_in_one_row_leaves_the_others_bitwise_alone(size: int) -> None:
    lengths = [200, 90, 313]
    blocks = blocks_of(lengths, CUDA)
    parts = parts_of(1, sum(lengths), size, (8, 4))
    with torch.no_grad():
        before = softcap.attend(*parts, blocks, None, size**-0.5, 5.0)
        for part in parts:
            part[:, 200:290].normal_()
        after = softcap.attend(*parts, blocks, None, size**-0.5, 5.0)
    assert torch.equal(before[:, :200], after[:, :200])
    assert torch.equal(before[:, 290:], after[:, 290:])
    assert not torch.equal(before[:, 200:290], after[:, 200:290])


def test_what_loading_compiled_serves_every_length_and_memory_grows_with_it(size: int) -> None:
    compiled = counters["stats"]["unique_graphs"]
    taken = []
    for length in (300, 1000, 2048, 5000, 10_000):
        parts = parts_of(1, length, size, (8, 4))
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for window in (None, 128):
            softcap.attend(*parts, blocks_of([length // 3, length - length // 3], CUDA), window, size**-0.5, 5.0).sum().backward()
        taken.append(torch.cuda.max_memory_allocated() - held)
    assert counters["stats"]["unique_graphs"] == compiled
    assert taken[-1] < 2.5 * taken[-2]  # scores of every pair would be four times as large

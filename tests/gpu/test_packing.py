"""Rows end to end on a CUDA device: the flash kernel that reads where rows begin, held to masks in 32 bits; batches that are recorded."""

from __future__ import annotations

import math
import random
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_fused as on_cpu
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, drive
from test_fused import FAMILIES, apart, in_32_bits, loaded_from, write

from qlora_tui.engine.batches import blocks_of, collate, epoch_order, pack
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.events import Evaluated, Finding, Planned, Stepped
from qlora_tui.engine.fast import graphs
from qlora_tui.engine.fast.blocks import attend
from qlora_tui.engine.fast.loss import token_losses
from qlora_tui.engine.load import Loaded, load
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.train.attention import Calls, calls_of, peak_bytes

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
WINDOWED = {**FAMILIES, "phi3": {**FAMILIES["phi3"], "sliding_window": 8}}


@pytest.fixture(autouse=True)
def on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "CPU", look())
    monkeypatch.setattr(on_cpu, "FAMILIES", WINDOWED)


def row(length: int, salt: int) -> TokenRow:
    chance = random.Random(salt)
    return TokenRow(salt, array("i", chance.choices(range(200), k=length)), bytes(at % 3 != 1 for at in range(length)))


Tensors = tuple[torch.Tensor, ...]


def attended(parts: Tensors, how: Callable[..., torch.Tensor]) -> Tensors:
    """What attention gives, and the gradients of queries, keys and values."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out = how(*leaves)
    (out.float() * torch.linspace(-1, 1, out.shape[-1], device=CARD)).sum().backward()
    grads = [leaf.grad for leaf in leaves]
    return out.detach().float(), *(grad.float() for grad in grads if grad is not None)


def masked(lengths: list[int], window: int | None, groups: int) -> Callable[..., torch.Tensor]:
    total = sum(lengths)
    at = torch.arange(total, device=CARD)
    block = torch.repeat_interleave(torch.arange(len(lengths), device=CARD), torch.tensor(lengths, device=CARD))
    back = at[:, None] - at
    seen = (block[:, None] == block) & (back >= 0) & (back < (window or total))

    def how(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        grouped = (part.repeat_interleave(groups, dim=2).transpose(1, 2) for part in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *grouped, seen, scale=0.1).transpose(1, 2)

    return how


@pytest.mark.parametrize("window", [None, 2, 64, 300, 5000])
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 4, 256), (14, 2, 64), (32, 32, 96), (6, 1, 16)], ids=str)
def test_the_kernel_is_as_close_to_32_bits_as_a_mask(heads: tuple[int, int, int], window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [700, 1, 129, 64, 300, 2]
    queries, keys, size = heads
    parts = tuple(torch.randn(1, sum(lengths), number, size, device=CARD).bfloat16() for number in (queries, keys, keys))
    with Calls(0) as calls:
        ours = attended(parts, lambda *given: attend(*given, blocks_of(lengths, CARD), window, 0.1))
    assert calls.seen["_varlen_attn"] == 1
    theirs = attended(parts, masked(lengths, window, queries // keys))
    exact = attended(tuple(part.float() for part in parts), masked(lengths, window, queries // keys))
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert (one - right).norm() < max(1.25 * (other - right).norm(), 4e-3 * right.norm())


def test_the_kernel_gives_a_row_the_same_bits_whatever_lies_before() -> None:
    lengths = [300, 500]
    parts = [torch.randn(1, 800, number, 128, device=CARD).bfloat16() for number in (8, 2, 2)]
    other = [torch.cat([torch.randn_like(part[:, :300]), part[:, 300:]], dim=1) for part in parts]
    left, right = (attend(*given, blocks_of(lengths, CARD), None, 0.1) for given in (parts, other))
    assert torch.equal(left[:, 300:], right[:, 300:])
    assert not torch.equal(left[:, :300], right[:, :300])


def test_padded_rows_longer_than_a_window_are_as_close_as_a_mask() -> None:
    parts = tuple(torch.randn(3, 700, number, 64, device=CARD).bfloat16() for number in (8, 2, 2))
    each = [tuple(part[at : at + 1] for part in parts) for at in range(3)]
    ours = attended(parts, lambda *given: attend(*given, None, 100, 0.1))
    exact = [attended(tuple(part.float() for part in one), masked([700], 100, 4)) for one in each]
    theirs = [attended(one, masked([700], 100, 4)) for one in each]
    for number, one in enumerate(ours):
        right, other = (torch.cat([found[number] for found in every]) for every in (exact, theirs))
        assert (one - right).norm() < max(1.25 * (other - right).norm(), 4e-3 * right.norm())


def learned(loaded: Loaded, rows: list[TokenRow], *, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for parameter in loaded.model.parameters():
        parameter.grad = None
    batch = (pack if packed else collate)(rows, CARD)
    hidden = loaded.hidden(batch.input_ids_BT, batch.blocks).flatten(0, 1)[batch.positions_N]
    (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1], device=CARD)).sum().backward()
    return hidden.detach().float(), {name: part.grad.float() for name, part in loaded.model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_rows_are_as_close_to_32_bits_as_padded_plain_ones(tmp_path: Path, kind: str) -> None:
    """One batch is a matter of luck, for any: errors are compared over many, with those of padded rows of either kind of layer."""
    write(tmp_path, kind)
    plain, fused = (loaded_from(tmp_path, fused=way, gradient_checkpointing="1") for way in (False, True))
    assert fused.why_plain == ""
    exact = in_32_bits(loaded_from(tmp_path, fused=False))
    ways = [(plain, False), (fused, False), (fused, True)]
    logs = torch.zeros(3, 2)
    for salt in range(24):
        rows = [row(length, salt * 9 + length) for length in (40, 23, 9, 1)]
        hidden, expected = learned(exact, rows, packed=False)
        for way, (loaded, packed) in enumerate(ways):
            ours, found = learned(loaded, rows, packed=packed)
            logs[way] += torch.tensor([float((ours - hidden).norm() / hidden.norm()), apart(found, expected)]).log()
    assert (logs[2] - logs[:2].amax(dim=0)).div(24).exp().max() < 1.25


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_row_sees_nothing_of_its_neighbour(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    loaded = loaded_from(tmp_path, fused=True)
    batches = [pack([row(20, salt), row(13, 5)], CARD) for salt in (3, 4)]
    with torch.no_grad():
        left, right = (loaded.hidden(batch.input_ids_BT, batch.blocks) for batch in batches)
    assert torch.equal(left[:, 20:], right[:, 20:])
    assert not torch.equal(left[:, :20], right[:, :20])


def test_long_rows_of_a_windowed_family_have_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(on_cpu.SHAPE, "max_position_embeddings", 32_768)
    write(tmp_path, "mistral")
    loaded = loaded_from(tmp_path, fused=True)
    assert calls_of(loaded, 16_384) == {"_varlen_attn": 3}
    assert peak_bytes(loaded, 16_384) < 16_384**2 // 2


@pytest.fixture
def run_of(tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> Callable[..., RunConfig]:
    write_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    write_tokenizer(tmp_path / "model")
    data = write_jsonl(chat_rows)

    def make(**values: Any) -> RunConfig:
        usual = {"model_name_or_path": str(tmp_path / "model"), "data": (str(data),), "max_length": 256, "max_steps": 40, "eval_steps": 10}
        usual |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "num_train_epochs": 100.0}
        return from_values({**usual, **values})

    return make


@pytest.mark.parametrize("graph", ["on", "off"])
def test_a_run_learns_what_padded_rows_learn(
    tmp_path: Path, run_of: Callable[..., RunConfig], graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, real = list[graphs.Shape](), graphs.Graphs._record

    def record(self: graphs.Graphs, shape: graphs.Shape) -> Any:
        shapes.append(shape)
        return real(self, shape)

    monkeypatch.setattr(graphs.Graphs, "_record", record)
    ran = {way: drive(run_of(packing=way, cuda_graphs=graph), tmp_path / way, machine=look()) for way in ("off", "on")}
    assert [one.error for one in ran.values()] == [None, None]
    assert any(shape.blocks for shape in shapes) is (graph == "on")
    assert len(set(shapes)) == len(shapes)
    assert not [found for found in ran["on"].of(Finding) if found.detector == "graphs"]
    left, right = (torch.tensor([step.loss for step in ran[way].of(Stepped)]) for way in ("off", "on"))
    assert left[-10:].mean() < left[:10].mean() - 0.3
    assert (left - right).abs().mean() < 0.02 * left.mean()
    assert [one.loss for one in ran["on"].of(Evaluated)] == pytest.approx([one.loss for one in ran["off"].of(Evaluated)], rel=0.03)


def test_a_stop_and_a_resume_change_nothing(tmp_path: Path, run_of: Callable[..., RunConfig]) -> None:
    run = run_of(max_steps=12, packing="auto")
    whole, again = (drive(run, tmp_path / name, machine=look()) for name in ("whole", "again"))
    assert whole.of(Planned)[-1].choices["packing"] == "on"
    noise = max(abs(a - b) for a, b in zip(whole.losses, again.losses, strict=True))
    part = drive(run, tmp_path / "part", Asked({5: "stop"}), machine=look())
    rest = drive(run, tmp_path / "part", resume=True, machine=look())
    gap = max(abs(a - b) for a, b in zip(whole.losses, part.losses + rest.losses, strict=True))
    assert gap <= max(4 * noise, 5e-3)


@pytest.mark.parametrize("at_once", [4, 16])
def test_how_fast_ragged_rows_are(tmp_path: Path, at_once: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints tokens a second of both ways: half a billion weights, 128 log-normal rows of median 350, batched as in a run."""
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8}
    write_model(tmp_path, **size, vocab_size=32_000, max_position_embeddings=2048)
    values = {"model_name_or_path": str(tmp_path), "data": ("x",), "gradient_checkpointing": "false", "method": "lora", "dtype": "bfloat16"}
    loaded = load(from_values(values), tmp_path, look())
    chance = random.Random(0)
    rows = [row(min(2048, max(16, round(chance.lognormvariate(math.log(350), 0.8)))), salt) for salt in range(128)]
    steps = epoch_order([len(one.input_ids) for one in rows], 16, 0, 0)
    parts = [[rows[place] for place in step[at : at + at_once]] for step in steps for at in range(0, 16, at_once)]
    real = sum(len(one.input_ids) for one in rows)

    def epoch(how: Callable[..., Any]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for part in parts:
            batch = how(part, CARD)
            hidden = loaded.hidden(batch.input_ids_BT, batch.blocks).flatten(0, 1)[batch.positions_N]
            token_losses(hidden, loaded.head, batch.labels_N).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    ways = {"padded": collate, "end to end": pack}
    seconds = {name: min(epoch(how) for _ in range(3)) for name, how in ways.items()}
    spent = {name: sum(how(part, CARD).input_ids_BT.numel() for part in parts) for name, how in ways.items()}
    with capsys.disabled():
        for name, taken in seconds.items():
            padding = 1 - real / spent[name]
            print(f"\n{at_once} rows at once, {name}: {real / taken:,.0f} real tokens/s, {padding:.1%} padding", end="")
    assert spent["end to end"] == real < spent["padded"]

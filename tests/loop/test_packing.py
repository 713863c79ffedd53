"""Rows that lie end to end are the rows they were alone: same losses and gradients, and nothing seen of a neighbour."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop_driver import Asked, drive
from test_fused import FAMILIES, apart, in_32_bits, loaded_from, write
from test_out_of_memory import Card

from qlora_tui.engine import measured, models
from qlora_tui.engine.batches import Batch, Blocks, Order, blocks_of, collate, epoch_order, micro_batches, pack
from qlora_tui.engine.budget import estimate
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.events import Evaluated, Finding, Planned, Stepped
from qlora_tui.engine.fast.blocks import attend
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.graphs import Graphs, empty, fill
from qlora_tui.engine.fast.loss import token_losses
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.machine import find_card
from qlora_tui.engine.meter import Meter
from qlora_tui.engine.padding import bucket, padded_share
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.choices import choose

CPU = torch.device("cpu")
Make = Callable[..., RunConfig]
Learned = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def row(length: int, salt: int) -> TokenRow:
    ids = [(at * 7 + salt) % 200 for at in range(length)]
    return TokenRow(salt, array("i", ids), bytes(at % 3 != 1 for at in range(length)))


ROWS = [row(20, 3), row(13, 5), row(1, 2), row(9, 11)]


def losses_of(loaded: Loaded, batch: Batch) -> torch.Tensor:
    hidden = loaded.hidden(batch.input_ids_BT, batch.blocks)
    head = replace(loaded.head, weight_VH=loaded.head.weight_VH.to(hidden.dtype))
    return token_losses(hidden.flatten(0, 1)[batch.positions_N], head, batch.labels_N)


def learned(loaded: Loaded, batch: Batch, counted: slice = slice(None)) -> Learned:
    """The loss of each supervised token, their labels, and every gradient of the sum of those `counted`."""
    for parameter in loaded.model.parameters():
        parameter.grad = None
    losses = losses_of(loaded, batch)
    losses[counted].sum().backward()
    found = {name: part.grad for name, part in loaded.model.named_parameters() if part.grad is not None}
    return losses.detach(), batch.labels_N, found


@pytest.mark.parametrize("recompute", ["false", "true"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_rows_learn_what_padded_rows_learn(tmp_path: Path, fused_on_cpu: None, kind: str, recompute: str) -> None:
    write(tmp_path, kind)
    loaded = in_32_bits(loaded_from(tmp_path, fused=True, gradient_checkpointing=recompute))
    padded, labels, right = learned(loaded, collate(ROWS, CPU))
    losses, same, ours = learned(loaded, pack(ROWS, CPU))
    assert torch.equal(labels, same)
    torch.testing.assert_close(losses, padded, rtol=1e-5, atol=1e-5)
    assert apart(ours, right) < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_sees_nothing_of_its_neighbour(tmp_path: Path, fused_on_cpu: None, kind: str) -> None:
    """To the bit: what the row's tokens lose, and what is learned from them, whatever lies before."""
    write(tmp_path, kind)
    loaded = in_32_bits(loaded_from(tmp_path, fused=True))
    own = len(pack([row(13, 5)], CPU).labels_N)
    (left, _, here), (right, _, there) = (learned(loaded, pack([row(20, salt), row(13, 5)], CPU), slice(-own, None)) for salt in (3, 4))
    assert torch.equal(left[-own:], right[-own:])
    assert not torch.equal(left[:-own], right[:-own])
    assert here.keys() == there.keys()
    for name, part in here.items():
        assert torch.equal(part, there[name]), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_mask_is_made_and_every_row_turns_from_place_0(tmp_path: Path, fused_on_cpu: None, kind: str) -> None:
    """Turning is relative, so losses could not tell where a row's places start."""
    write(tmp_path, kind)
    loaded = loaded_from(tmp_path, fused=True)
    masks, angles = list[torch.Tensor](), list[torch.Tensor]()
    for layer in loaded.decoder.layers:
        layer.register_forward_pre_hook(lambda _, __, named: masks.append(named["attention_mask"]), with_kwargs=True)
        layer.register_forward_pre_hook(lambda _, __, named: angles.extend(named["position_embeddings"]), with_kwargs=True)
    with torch.no_grad():
        losses_of(loaded, pack([row(20, 3), row(13, 5)], CPU))
    assert [mask.numel() for mask in masks] == [0] * 3
    assert len(angles) == 6
    for part in angles:
        assert torch.equal(part[:, 20:], part[:, :13])


def test_places_start_again_and_no_first_token_is_a_target() -> None:
    packed = pack([row(3, 1), row(2, 0), row(4, 3)], CPU)
    assert packed.blocks is not None
    assert packed.blocks.places_1T.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert packed.blocks.bounds.tolist() == [0, 3, 5, 9]
    assert packed.blocks.longest == 4
    assert packed.positions_N.tolist() == [1, 6, 7]
    assert packed.supervised == [1, 0, 2]
    assert packed.tokens == 9


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_packing_finds_the_targets_that_padding_finds(lengths: list[int]) -> None:
    rows = [row(length, salt) for salt, length in enumerate(lengths)]
    packed, padded = pack(rows, CPU), collate(rows, CPU)
    assert torch.equal(packed.labels_N, padded.labels_N)
    assert packed.supervised == padded.supervised
    assert packed.tokens == padded.tokens == packed.input_ids_BT.numel()
    before = packed.input_ids_BT.flatten()[packed.positions_N]
    assert torch.equal(before, padded.input_ids_BT.flatten()[padded.positions_N])


def seen_by(lengths: list[int], window: int | None) -> torch.Tensor:
    """One mask over rows that lie end to end: causal, each row apart."""
    at, block = torch.arange(sum(lengths)), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    back = at[:, None] - at
    return (block[:, None] == block) & (back >= 0) & (back < (window or sum(lengths)))


def parts_of(lengths: list[int], heads: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(1, sum(lengths), number, 8) for number in (heads[0], heads[1], heads[1])]


LAID = {
    "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=5),
    "window": st.none() | st.integers(1, 14),
    "heads": st.sampled_from([(4, 4), (4, 2), (6, 1)]),
}


@given(**LAID)
def test_attention_is_that_of_one_mask_over_all(lengths: list[int], window: int | None, heads: tuple[int, int]) -> None:
    query, key, value = parts_of(lengths, heads)
    ours, seen = attend(query, key, value, blocks_of(lengths, CPU), window, 0.3), seen_by(lengths, window)
    grouped = (part.repeat_interleave(heads[0] // heads[1], dim=2).transpose(1, 2) for part in (key, value))
    whole = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *grouped, seen, scale=0.3)
    torch.testing.assert_close(ours, whole.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_a_window_is_seen_in_padded_rows_too() -> None:
    query, key, value = (torch.randn(2, 10, number, 8) for number in (4, 2, 2))
    ours = attend(query, key, value, None, 3, 0.3)
    each = [attend(*(part[at : at + 1] for part in (query, key, value)), blocks_of([10], CPU), 3, 0.3) for at in range(2)]
    torch.testing.assert_close(ours, torch.cat(each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_fused_layers_know_their_windows_without_a_mask(tmp_path: Path, fused_on_cpu: None, kind: str) -> None:
    """As on a card, where padded rows come with no mask too; a processor's rows come with the one that transformers makes."""
    write(tmp_path, kind)
    loaded = in_32_bits(loaded_from(tmp_path, fused=True))
    ids = collate([row(20, 3), row(13, 5)], CPU).input_ids_BT
    with torch.no_grad():
        bare = loaded.decoder(input_ids=ids, attention_mask=torch.empty(1, 1, 0, 0), use_cache=False).last_hidden_state
        torch.testing.assert_close(bare, loaded.hidden(ids), rtol=1e-4, atol=1e-5)


def test_layers_that_are_not_fused_refuse_packed_rows(tmp_path: Path) -> None:
    write(tmp_path, "llama")
    batch = pack(ROWS, CPU)
    with pytest.raises(ValueError, match="fused layers only"):
        loaded_from(tmp_path, fused=False).hidden(batch.input_ids_BT, batch.blocks)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_recorded_batch_holds_its_rows_and_one_more_of_which_nothing_is_learned(tmp_path: Path, fused_on_cpu: None, kind: str) -> None:
    write(tmp_path, kind)
    loaded = in_32_bits(loaded_from(tmp_path, fused=True))
    flat = Flat([torch.nn.Parameter(torch.zeros(1))], [None])
    graphs = Graphs(torch.nn.Linear(1, 1), flat, lambda batch: losses_of(loaded, batch), [43, 60], longest=20)
    for rows, size in ((ROWS, 43), ([*ROWS, row(4, 7)], 60)):
        batch = pack(rows, CPU)
        shape = graphs.shape(batch)
        assert (shape.rows, shape.length, shape.blocks) == (1, size, len(rows))
        own = empty(shape, 43, CPU)
        fill(own, pack([row(30, 1)], CPU))  # what was there before
        fill(own, batch)
        losses, _, right = learned(loaded, batch)
        filled, _, ours = learned(loaded, own, slice(0, len(losses)))
        torch.testing.assert_close(filled[: len(losses)], losses, rtol=1e-5, atol=1e-5)
        assert apart(ours, right) < 1e-5


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), rows=st.sampled_from([1, 2, 4]), seed=st.integers(0, 5))
def test_totals_are_those_of_the_batches_to_come(lengths: list[int], rows: int, seed: int) -> None:
    order = Order([row(length, number) for number, length in enumerate(lengths)], 4, seed)
    steps = [order.of(step) for step in range(1, order.per_epoch + 1)]
    made = [sum(len(one.input_ids) for one in part) for step in steps for part in micro_batches(step, rows)]
    assert order.totals(rows) == made


def test_padding_is_near_what_an_epoch_has() -> None:
    lengths = [50 + 37 * at % 1950 for at in range(400)]
    counted = padded_share(bucket(lengths, 16), 8)
    steps = [sorted((lengths[row] for row in step), reverse=True) for step in epoch_order(lengths, 16, 1, 0)]
    parts = [step[at : at + 8] for step in steps for at in range(0, len(step), 8)]
    real = 1 - sum(lengths) / sum(max(part) * len(part) for part in parts)
    assert 0.03 < real < 0.3
    assert counted == pytest.approx(real, rel=0.25)


USUAL: dict[str, Any] = {"dtype": "bfloat16", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def test_a_hundred_steps_learn_what_padded_rows_learn(run_of: Make, tmp_path: Path, fused_on_cpu: None) -> None:
    values = {**USUAL, "max_steps": 100, "num_train_epochs": 100.0, "learning_rate": 2e-3, "eval_steps": 50}
    padded, packed = (drive(run_of(**values, packing=way), tmp_path / way) for way in ("off", "on"))
    assert padded.error is packed.error is None
    left, right = (torch.tensor([step.loss for step in ran.of(Stepped)]) for ran in (padded, packed))
    assert len(left) == len(right) == 100
    assert [step.rows for step in padded.of(Stepped)] == [step.rows for step in packed.of(Stepped)]
    assert [step.supervised_tokens for step in padded.of(Stepped)] == [step.supervised_tokens for step in packed.of(Stepped)]
    assert float(left[0]) == pytest.approx(float(right[0]), rel=2e-3)
    assert left[-10:].mean() < left[:10].mean() - 0.5
    assert (left - right).abs().mean() < 0.02 * left.mean()
    assert [found.loss for found in packed.of(Evaluated)] == pytest.approx([found.loss for found in padded.of(Evaluated)], rel=0.05)


@pytest.mark.parametrize("way", ["on", "off"])
def test_steps_and_measurements_both_go_that_way(
    run_of: Make, tmp_path: Path, fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    seen, real = set[tuple[bool, bool]](), Loaded.hidden

    def hidden(loaded: Loaded, ids: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        if ids.shape != (1, 8):  # the loader's own check
            seen.add((torch.is_grad_enabled(), blocks is not None))
        return real(loaded, ids, blocks)

    monkeypatch.setattr(Loaded, "hidden", hidden)
    assert drive(run_of(**USUAL, packing=way, max_steps=2), tmp_path / "run").error is None
    assert seen == {(True, way == "on"), (False, way == "on")}


def test_a_stop_and_a_resume_change_no_bit(run_of: Make, tmp_path: Path, fused_on_cpu: None) -> None:
    run = run_of(**USUAL, packing="on", max_steps=8)
    whole = drive(run, tmp_path / "whole")
    part = drive(run, tmp_path / "part", Asked({3: "stop"}))
    rest = drive(run, tmp_path / "part", resume=True)
    assert whole.error is part.error is rest.error is None
    assert part.losses + rest.losses == whole.losses
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert adapters[0] == adapters[1]


def test_a_measurement_between_steps_changes_no_bit(run_of: Make, tmp_path: Path, fused_on_cpu: None) -> None:
    often, seldom = (drive(run_of(**USUAL, packing="on", eval_steps=every), tmp_path / str(every)) for every in (1, 100))
    assert often.error is seldom.error is None
    assert len(often.of(Evaluated)) > len(seldom.of(Evaluated))
    assert often.losses == seldom.losses


def test_the_choice_is_told_and_kept_by_a_resume(run_of: Make, tmp_path: Path, fused_on_cpu: None) -> None:
    ran = drive(run_of(**USUAL, packing="auto"), tmp_path / "run", Asked({3: "stop"}))
    assert ran.error is None
    assert ran.of(Planned)[-1].choices["packing"] == "on"
    again = drive(run_of(**USUAL, packing="auto"), tmp_path / "run", resume=True)
    assert again.of(Planned)[-1].choices["packing"] == "on"
    alone = drive(run_of(**{**USUAL, "per_device_train_batch_size": 1}, packing="auto"), tmp_path / "alone")
    assert alone.of(Planned)[-1].choices["packing"] == "off"


def test_when_memory_runs_out_the_same_rows_go_in_halves(
    run_of: Make, tmp_path: Path, fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    expected = drive(run_of(**{**USUAL, **smaller}, packing="on", eval_steps=100), tmp_path / "smaller")
    card = Card(monkeypatch, 2)
    ran = drive(run_of(**USUAL, packing="on", eval_steps=100), tmp_path / "run")
    assert ran.error is expected.error is None
    assert card.passes[:3] == [4, 2, 2]
    assert ran.losses == expected.losses


@pytest.mark.parametrize(("way", "length"), [("on", 100), ("off", 200)])
def test_memory_is_remembered_against_the_batch_that_was_measured(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, length: int
) -> None:
    """Else a packed batch, which never holds the longest row so many times, would teach that formulas say too much."""
    run, device = run_of(**USUAL, packing=way), find_card("H100 80GB")
    spec = models.from_folder(Path(run.model_name_or_path))
    taken, told = choose(spec, run, device, [200, 100, 50, 50, 7]), list[dict[str, int]]()
    monkeypatch.setattr(measured, "remember_memory", lambda _, __, predicted, ___: told.append(predicted))
    taken.remember(Meter(CPU, device, {}), [], None, halved=False)
    whole = estimate(spec, taken.run, device, longest=length)
    assert told == [{phase.name: phase.bytes for phase in whole.phases}]


def test_packing_where_layers_are_not_fused_ends_in_one_sentence(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(**USUAL, packing="on"), tmp_path / "run")
    assert "packing=on: rows lie end to end for fused layers only: there is no CUDA device" in str(ran.error)
    assert not ran.of(Finding)

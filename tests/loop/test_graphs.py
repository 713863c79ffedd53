"""What batches are rounded up to before they are recorded; recording itself needs a card: tests/gpu/test_graphs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, eager_mask, sliding_window_causal_mask_function

from qlora_tui.engine.batches import Batch
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.graphs import SIZES, Graphs, sizes
from qlora_tui.engine.fast.scores import mask_on_device

FLAT = Flat([torch.nn.Parameter(torch.zeros(1))], [None])


def batch_of(rows: int, length: int, supervised: int) -> Batch:
    positions = torch.arange(supervised)
    return Batch(torch.zeros(rows, length, dtype=torch.long), positions, positions, [supervised], rows * length)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_every_row_has_a_size_it_fits_and_equal_rows_are_not_padded(lengths: list[int]) -> None:
    found = sizes(lengths)
    assert found == sorted(set(found))
    assert len(found) <= SIZES
    assert found[-1] == max(lengths)
    assert set(found) <= set(lengths)


@given(lengths=st.lists(st.integers(1, 5000), min_size=12, max_size=300))
def test_few_rows_share_a_size(lengths: list[int]) -> None:
    found, share = sizes(lengths), -(-len(lengths) // SIZES)
    for low, high in zip([0, *found], found, strict=False):
        between = [length for length in lengths if low < length < high]
        assert len(between) <= share  # those that are padded; rows of the size itself are not


@given(rows=st.integers(1, 8), lengths=st.lists(st.integers(2, 400), min_size=1, max_size=40), data=st.data())
def test_a_shape_holds_its_batch_and_little_more(rows: int, lengths: list[int], data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(lengths))
    supervised = data.draw(st.integers(1, rows * length))
    graphs = Graphs(torch.nn.Linear(1, 1), FLAT, lambda *_: torch.zeros(1), lengths)
    shape = graphs.shape(batch_of(rows, length, supervised))
    assert shape.rows == rows
    assert length <= shape.length <= max(lengths)
    assert supervised <= shape.supervised <= rows * shape.length
    assert shape.supervised - supervised <= -(-rows * shape.length // 4)


def test_a_row_longer_than_all_that_were_told_has_a_shape_of_its_own() -> None:
    graphs = Graphs(torch.nn.Linear(1, 1), FLAT, lambda *_: torch.zeros(1), [10, 20])
    assert graphs.shape(batch_of(1, 30, 30)) == (1, 30, 30, 0)


@pytest.mark.parametrize("sees", [causal_mask_function, sliding_window_causal_mask_function(3)], ids=["all", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_made_on_the_device_alone_has_transformers_own_numbers(sees: Any, dtype: torch.dtype) -> None:
    how = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": sees, "allow_is_causal_skip": True, "device": "cpu"}
    padded = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for attention_mask in (None, padded):
        found = mask_on_device(dtype=dtype, attention_mask=attention_mask, **how)
        own = eager_mask(dtype=dtype, attention_mask=attention_mask, **how)
        assert found.dtype == own.dtype
        assert torch.equal(found, own)

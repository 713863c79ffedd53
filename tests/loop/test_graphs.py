"""What batches are rounded up to before they are recorded; recording itself needs a card: tests/gpu/test_graphs.py."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.batches import Batch
from qlora_tui.engine.fast.flat import Flat
from qlora_tui.engine.fast.graphs import SIZES, Graphs, sizes

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

"""The pure parts of training: which rows meet, how the learning rate goes, what a comparison says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loop_driver import CPU

from qlora_tui.engine import evaluate
from qlora_tui.engine.batches import collate, epoch_order, steps_per_epoch
from qlora_tui.engine.data import load as load_data
from qlora_tui.engine.data import load_tokenizer, prepare
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.load import load
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.timetable import cadence
from qlora_tui.engine.train.schedule import learning_rate, total_steps, warmup_steps

LENGTHS = st.lists(st.integers(2, 500), min_size=1, max_size=200)
Make = Callable[..., RunConfig]


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 9))
def test_every_row_comes_once_an_epoch(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    order = epoch_order(lengths, size, seed, epoch)
    assert sorted(row for step in order for row in step) == list(range(len(lengths)))
    assert len(order) == steps_per_epoch(len(lengths), size)
    assert all(len(step) == size for step in order[:-1])
    assert order == epoch_order(lengths, size, seed, epoch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    lengths = list(range(2, 66))
    orders = [epoch_order(lengths, 4, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(order) for order in orders}) == 4


def test_rows_of_a_step_are_of_like_length() -> None:
    lengths = [10, 500] * 64
    spread = [max(lengths[row] for row in step) - min(lengths[row] for row in step) for step in epoch_order(lengths, 4, 0, 0)]
    assert sum(spread) / len(spread) < 245 / 2


@given(
    total=st.integers(1, 500),
    warm=st.one_of(st.floats(0, 0.99), st.integers(1, 600).map(float)),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_learning_rate_stays_between_nothing_and_what_was_asked(total: int, warm: float, kind: str) -> None:
    run = from_values({"learning_rate": 1e-3, "warmup_steps": warm, "lr_scheduler_type": kind})
    rates = [learning_rate(run, step, total) for step in range(1, total + 1)]
    assert all(0 < rate <= 1e-3 for rate in rates)
    ramp = warmup_steps(run, total)
    assert ramp <= total
    assert rates[max(0, ramp - 1)] == pytest.approx(1e-3)
    falling = rates[max(0, ramp - 1) :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1.0, 0, 10), (1.5, 0, 15), (0.01, 0, 1), (2.0, 7, 7), (0.0, 25, 25), (1.05, 0, 11)]
)
def test_how_many_steps_a_run_has(epochs: float, max_steps: int, expected: int) -> None:
    assert total_steps(from_values({"num_train_epochs": epochs, "max_steps": max_steps}), 10) == expected


def test_cadence_is_as_asked_or_a_share_of_the_run() -> None:
    assert (cadence(7, 100, 5), cadence(0, 100, 5), cadence(0, 3, 5)) == (7, 20, 1)


@pytest.mark.parametrize(("freedom", "expected"), [(4, 2.776), (9, 2.262), (23, 2.069), (99, 1.984)])
def test_the_quantile_of_student(freedom: int, expected: float) -> None:
    assert evaluate.student_t(freedom) == pytest.approx(expected, rel=0.005)


def rows(*means: float, tokens: int = 10) -> list[RowLoss]:
    return [RowLoss(number, mean * tokens, tokens) for number, mean in enumerate(means)]


@pytest.mark.parametrize(
    ("base", "tuned", "says"),
    [
        ((4.0, 4.2, 4.1, 4.4, 4.3), (3.0, 3.1, 3.2, 3.4, 3.2), "measurable improvement"),
        ((4.0, 4.2, 4.1, 4.4, 4.3), (3.8, 4.0, 3.9, 4.2, 4.1), "less than 0.5 nats"),
        ((4.0, 4.2, 4.1, 4.4, 4.3), (5.0, 3.1, 4.2, 5.4, 3.2), "no clear change"),
        ((4.0, 4.2, 4.1, 4.4, 4.3), (4.5, 4.8, 4.6, 4.9, 4.9), "worse than the base"),
        ((4.0, 9.0, 4.0), (4.0, 1.0, 4.0), "no clear change"),
    ],
)
def test_size_and_interval_both_count(base: tuple[float, ...], tuned: tuple[float, ...], says: str) -> None:
    assert says in evaluate.compare(rows(*base), rows(*tuned)).verdict


def test_a_comparison_weighs_rows_and_a_loss_weighs_tokens() -> None:
    base, tuned = [RowLoss(1, 10.0, 10), RowLoss(2, 300.0, 100)], [RowLoss(1, 5.0, 10), RowLoss(2, 200.0, 100)]
    card = evaluate.compare(base, tuned)
    assert card.base_loss == pytest.approx(310 / 110)
    assert card.loss == pytest.approx(205 / 110)
    assert card.drop == pytest.approx((0.5 + 1.0) / 2)
    assert card.better_share == 1.0


def test_one_row_proves_nothing() -> None:
    card = evaluate.compare(rows(4.0), rows(1.0))
    assert card.interval == (-math.inf, math.inf)
    assert "no clear change" in card.verdict


def test_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same rows"):
        evaluate.compare(rows(1.0, 2.0), rows(1.0))


def test_the_loss_does_not_depend_on_the_batch(run_of: Make) -> None:
    run = run_of(val_set_size=13.0)
    folder = Path(run.model_name_or_path)
    held_out = prepare(run, load_data(run), load_tokenizer(folder)).holdout
    loaded = load(run, folder, CPU)
    loaded.model.eval()
    measured = []
    for batch in (1, 3, 8):
        work = evaluate.measure(loaded, held_out, batch, lambda: None)
        try:
            while True:
                next(work)
        except StopIteration as end:
            measured.append(end.value)
    assert [loss.row for loss in measured[0]] == [row.row for row in held_out]
    for other in measured[1:]:
        assert [loss.nll for loss in other] == pytest.approx([loss.nll for loss in measured[0]], rel=1e-6)


def test_padding_is_never_a_target_whatever_its_id(run_of: Make) -> None:
    """Token 0 pads; a real token 0 that is trained must count all the same."""
    from array import array

    from qlora_tui.engine.data import TokenRow

    short, long = TokenRow(1, array("i", [5, 0, 0]), b"\0\1\1"), TokenRow(2, array("i", [7, 8, 9, 3, 4]), b"\0\0\1\0\1")
    batch = collate([short, long], torch.device("cpu"))
    assert batch.labels_N.tolist() == [0, 0, 9, 4]
    assert batch.positions_N.tolist() == [0, 1, 6, 8]
    assert (batch.supervised, batch.tokens) == ([2, 2], 8)

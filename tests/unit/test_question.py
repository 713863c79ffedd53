"""Answers after the wrong question: which are made, and what their losses say about manner and content."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qlora_tui.engine import evaluate
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.score import manner_alone
from qlora_tui.engine.train import question

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
NATS = st.floats(0.1, 5.0)


def row(number: int, asked: list[int], answer: list[int]) -> TokenRow:
    return TokenRow(number, array("i", asked + answer), b"\0" * len(asked) + b"\1" * len(answer))


def losses(means: list[float]) -> list[RowLoss]:
    return [RowLoss(number, 7 * mean, 7) for number, mean in enumerate(means)]


@given(st.lists(st.tuples(IDS, IDS), max_size=90), st.integers(4, 12), st.integers(0, 9))
def test_every_answer_stands_after_a_question_that_is_not_its_own(told: list[tuple[list[int], list[int]]], longest: int, seed: int) -> None:
    rows = [row(number, asked, answer) for number, (asked, answer) in enumerate(told, 1)]
    made = question.pairs(rows, longest, seed)
    assert not made or question.LEAST_PAIRS <= len(made) <= question.MOST_PAIRS
    assert made == question.pairs(rows, longest, seed)
    assert [pair.place for pair in made] == sorted({pair.place for pair in made})
    for pair in made:
        own, first = rows[pair.place], pair.row.trained.find(1)
        asked, answer = [*pair.row.input_ids[:first]], pair.row.input_ids[first:]
        assert (pair.row.row, len(pair.row.input_ids)) == (own.row, len(pair.row.trained))
        assert answer == own.input_ids[own.trained.find(1) :]
        assert len(pair.row.input_ids) <= longest
        others = [said for other, said in told if other == asked]
        assert asked != told[pair.place][0]
        assert any(said != [*answer] for said in others)
        assert len(asked) > 1


def test_where_labels_are_few_the_question_belongs_to_another_label() -> None:
    rows = [row(number, [5, number], [number // 3 % 2]) for number in range(30)]
    made = question.pairs(rows, 99, 0)
    assert len(made) == 30
    for pair in made:
        asked = pair.row.input_ids[1]
        assert [*pair.row.input_ids[2:]] == [pair.place // 3 % 2] != [asked // 3 % 2]


@pytest.mark.parametrize(
    "rows",
    [
        [TokenRow(n, array("i", [n, 1, 2]), b"\0\1\1") for n in range(30)],  # plain text: no question
        [TokenRow(n, array("i", [n, 1, 2, 3, n]), b"\0\0\1\0\1") for n in range(30)],  # two answers
        [row(n, [4, 4], [n]) for n in range(30)],  # one question for all
        [row(n, [4, n], [1]) for n in range(30)],  # one answer for all
        [row(n, [4, n], [n]) for n in range(question.LEAST_PAIRS - 1)],  # too few
        [row(n, [4, n], []) for n in range(30)],  # nothing to predict
        [],
    ],
)
def test_rows_without_a_wrong_question_are_left_out(rows: list[TokenRow]) -> None:
    assert question.pairs(rows, 99, 0) == []


@given(st.lists(st.tuples(NATS, NATS), min_size=8, max_size=40), st.floats(-2, 2), st.floats(-2, 2))
def test_what_an_answer_gains_everywhere_is_manner_and_the_rest_is_more(
    told: list[tuple[float, float]], manner: float, content: float
) -> None:
    """Training makes every answer `manner` nats likelier, and `content` nats on top after its own question."""
    base, other = [own for own, _ in told], [other for _, other in told]
    tuned, other_tuned = [loss - manner - content for loss in base], [loss - manner for loss in other]
    found = question.own(losses(base), losses(tuned), losses(other), losses(other_tuned))
    assert found.more == pytest.approx(content, abs=1e-9)
    assert found.interval == pytest.approx((content, content), abs=1e-6)
    assert (found.gain, found.other_gain) == pytest.approx((manner + content, manner), abs=1e-9)
    helped = sum(other) / len(told) - sum(base) / len(told)
    assert found.helps == pytest.approx(helped + content, abs=1e-6)


@given(st.lists(st.tuples(NATS, NATS, NATS, NATS), min_size=8, max_size=40))
def test_manner_is_found_exactly_where_the_gain_is_sure_and_the_own_question_is_not(told: list[tuple[float, ...]]) -> None:
    four = [losses([one[place] for one in told]) for place in range(4)]
    card, found = evaluate.compare(four[0], four[1]), question.own(*four)
    assume(card.interval[0] != 0 != found.interval[0])
    warned = question.manner(9, card, found)
    learned = found.interval[0] > 0 and found.more >= question.LEAST_SHARE * found.gain
    assert (warned is not None) == (card.interval[0] > 0 and not learned)
    if warned is not None:
        assert warned.severity == "warn"
        assert f"{found.gain:.2f}" in warned.message
        helped = found.helps_interval[0] > 0 and found.helps >= question.LEAST_SHARE * found.gain
        assert ("no clear help" in warned.message) is not helped
        assert ("shuffled" in warned.advice[0]) is not helped


@pytest.mark.parametrize(("content", "named"), [(0.0, True), (0.02, True), (0.5, False), (-0.3, True)])
def test_a_share_that_is_sure_but_tiny_is_no_content(content: float, named: bool) -> None:
    noise = [0.01 * (number % 5 - 2) for number in range(20)]
    base, tuned = losses([4 + one for one in noise]), losses([3 + one / 2 - content for one in noise])
    found = question.own(base, tuned, base, losses([3.0] * 20))
    warned = question.manner(9, evaluate.compare(base, tuned), found)
    assert (warned is not None) is named


def test_losses_that_are_no_numbers_find_nothing() -> None:
    bad = losses([float("nan")] * 9)
    assert question.manner(9, evaluate.compare(bad, bad), question.own(bad, bad, bad, bad)) is None


def test_losses_of_other_answers_are_refused() -> None:
    mine = losses([1.0] * 9)
    with pytest.raises(ValueError, match="same answers"):
        question.own(mine, mine, [RowLoss(loss.row, 1.0, 8) for loss in mine], mine)


def test_the_verdict_of_manner_claims_no_improvement() -> None:
    assert manner_alone(1.359, 1.329).startswith("no clear improvement beyond manner: ")

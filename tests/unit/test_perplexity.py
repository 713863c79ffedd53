"""The rule of the triage: what goes, what stays, and what is told of it."""

from __future__ import annotations

import io
import json
import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.data import TokenRow, TokenRows
from qlora_tui.engine.data.perplexity import EXEMPT_TOKENS, digest, judge, long_answers, perplexity, targets, without
from qlora_tui.engine.data.prepare import PreparedFacts, Tokenized
from qlora_tui.engine.data.store import Writer
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig

RUN = RunConfig(perplexity_filter=3.0)
MEANS = st.lists(st.floats(min_value=0.0, max_value=12.0), min_size=1, max_size=60)


def stored(rows: list[TokenRow]) -> TokenRows:
    ids, mask = io.BytesIO(), io.BytesIO()
    writer = Writer.into(ids, mask)
    for row in rows:
        writer.add(row)
    columns = {"ids": ids.getvalue(), "mask": mask.getvalue(), "numbers": writer.numbers.tobytes(), "ends": writer.ends.tobytes()}
    return TokenRows({name: memoryview(content) for name, content in columns.items()}, range(len(rows)))


def row(number: int, answer: int) -> TokenRow:
    return TokenRow(number, array("i", range(4 + answer)), bytes(4) + b"\x01" * answer)


@given(MEANS, st.floats(min_value=1.01, max_value=100.0), st.floats(min_value=0.0, max_value=1.0))
def test_only_what_is_under_the_threshold_goes_the_lowest_first_and_never_more_than_allowed(
    means: list[float], threshold: float, most: float
) -> None:
    judged = judge(RunConfig(perplexity_filter=threshold, perplexity_drop_most=most), len(means), range(len(means)), means)
    under = [place for place, mean in enumerate(means) if perplexity(mean) < threshold]
    gone = judged.left_out
    assert set(gone) <= set(under)
    assert len(gone) == min(len(under), math.floor(most * len(means) + 1e-9))
    stay = [means[place] for place in under if place not in gone]
    assert not gone or not stay or max(means[place] for place in gone) <= min(stay)
    assert any("perplexity_drop_most" in note for note in judged.notes) == (len(gone) < len(under))


@given(MEANS)
def test_confirming_the_share_that_the_note_names_leaves_out_all(means: list[float]) -> None:
    judged = judge(RUN, len(means), range(len(means)), means)
    named = [note.rpartition("perplexity_drop_most=")[2].split()[0] for note in judged.notes if "perplexity_drop_most" in note]
    share = float(named[0]) if named else 0.2
    again = judge(RunConfig(perplexity_filter=3.0, perplexity_drop_most=share), len(means), range(len(means)), means)
    assert set(again.left_out) == {place for place, mean in enumerate(means) if perplexity(mean) < 3.0}


def test_the_histogram_tells_both_ends() -> None:
    judged = judge(RUN, 12, range(10), [math.log(value) for value in (1.2, 2, 2.9, 3.1, 9, 11, 31, 99, 101, 5000)])
    words = "under 1.5: 1, 1.5 to 3: 2, 3 to 10: 2, 10 to 30: 1, 30 to 100: 2, 100 and more: 2"
    assert words in judged.notes[0]
    assert "2 answers of fewer than 16 tokens were not judged" in judged.notes[1]
    assert judge(RUN, 1, [0], [5000.0]).left_out == {}  # exp of it is no float
    assert "100 and more: 1" in judge(RUN, 9, [0], [math.nan]).notes[0]


def test_short_answers_are_exempt_by_the_tokens_that_are_predicted() -> None:
    first_trained = TokenRow(3, array("i", range(EXEMPT_TOKENS)), b"\x01" * EXEMPT_TOKENS)
    rows = stored([row(1, EXEMPT_TOKENS), row(2, EXEMPT_TOKENS - 1), first_trained, row(4, 40)])
    assert list(long_answers(rows, lambda: None)) == [0, 3]
    assert targets(first_trained) == EXEMPT_TOKENS - 1


def test_rows_left_out_are_counted_listed_and_gone_from_training_alone() -> None:
    train, holdout = stored([row(1, 20), row(2, 30), row(5, 40)]), stored([row(3, 25)])
    facts = PreparedFacts(5, 3, 1, 102, 90, 29, 44, dropped={"too long": 1}, notes=("before",))
    before = Tokenized(train, holdout, facts, b'{"row": 4, "reason": "too long"}\n')
    left = without(before, judge(RUN, 5, [0, 2], [2.0, 0.5]), 3.0)
    assert [each.row for each in left.train] == [1, 2]
    assert left.holdout == holdout
    assert (left.facts.train_rows, left.facts.tokens, left.facts.supervised_tokens, left.facts.max_row_tokens) == (2, 58, 50, 34)
    reason = "the base knows the answer: perplexity under 3"
    assert left.facts.dropped == {"too long": 1, reason: 1}
    assert left.facts.notes[0] == "before"
    lost = [json.loads(line) for line in left.lost.splitlines()]
    assert lost[0]["row"] == 4
    assert lost[1] == {"row": 5, "reason": reason, "perplexity": round(math.exp(0.5), 6), "tokens": 44, "supervised": 40}


def test_a_digest_knows_tokens_mask_and_where_a_row_ends() -> None:
    def made(*rows: TokenRow) -> str:
        return digest(stored(list(rows)), lambda: None)

    one, other = TokenRow(1, array("i", [1, 2]), b"\x00\x01"), TokenRow(1, array("i", [1, 2]), b"\x01\x01")
    halves = (TokenRow(1, array("i", [1]), b"\x00"), TokenRow(1, array("i", [2]), b"\x01"))
    assert len({made(one), made(other), made(*halves), made(one, one)}) == 4
    assert made(one) == made(TokenRow(7, array("i", [1, 2]), b"\x00\x01"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"perplexity_filter": 0.5}, "perplexity_filter"),
        ({"perplexity_filter": 3.0, "perplexity_drop_most": 0.0}, "perplexity_drop_most"),
    ],
)
def test_a_filter_that_could_never_leave_a_row_out_is_refused(values: dict[str, float], key: str) -> None:
    usual = RunConfig(model_name_or_path="m", data=("d",))
    assert problems(usual) == []
    (found,) = problems(RunConfig(model_name_or_path="m", data=("d",), **values))
    assert found.where == key

"""What is trained, what is held out, and the numbers about both."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine import data
from qlora_tui.engine.data import Chat, Dataset, Row, Tokenized, Tokenizer, Turn, describe, load, load_tokenizer, prepare
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.spec import RunConfig


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


def rows(texts: Sequence[str]) -> Dataset:
    chats = [Chat((Turn("user", f"say {text}"), Turn("assistant", text))) for text in texts]
    return Dataset(tuple(Row(number, number, chat) for number, chat in enumerate(chats, 1)), format="messages", why="said")


def run(**changes: Any) -> RunConfig:
    return RunConfig(data=("x",), **changes)


def numbers(tokenized: Tokenized) -> tuple[list[int], list[int]]:
    return [row.row for row in tokenized.train], [row.row for row in tokenized.holdout]


def texts(found: Sequence[data.TokenRow], dataset: Dataset) -> set[str]:
    by_number = {row.number: row.chat.turns[1].content for row in dataset.rows}
    return {by_number[row.row] for row in found}


DISTINCT = [f"answer number {number}" for number in range(60)]


@pytest.mark.parametrize(
    ("count", "val_set_size", "held"),
    [(60, 0.1, 6), (60, 0.0, 0), (60, 24.0, 24), (12, 0.01, 1), (5, 0.05, 0), (1, 0.5, 0), (3, 50.0, 2), (2, 1.0, 1)],
)
def test_the_hold_out_has_the_size_asked_for_and_leaves_a_row(tokenizer: Tokenizer, count: int, val_set_size: float, held: int) -> None:
    found = prepare(run(val_set_size=val_set_size), rows(DISTINCT[:count]), tokenizer)
    assert (len(found.train), len(found.holdout)) == (count - held, held)
    assert (found.facts.train_rows, found.facts.holdout_rows) == (count - held, held)
    assert sorted([*numbers(found)[0], *numbers(found)[1]]) == list(range(1, count + 1))


def test_a_share_is_capped_and_a_number_is_obeyed(tokenizer: Tokenizer) -> None:
    many = rows([f"row {number}" for number in range(1400)])
    capped = prepare(run(val_set_size=0.5), many, tokenizer)
    assert len(capped.holdout) == 500
    assert any("500 rows are held out, not 700" in note for note in capped.facts.notes)
    assert len(prepare(run(val_set_size=700.0), many, tokenizer).holdout) == 700


def test_the_seed_decides_and_the_order_of_the_file_does_not(tokenizer: Tokenizer) -> None:
    straight, turned = rows(DISTINCT), rows(DISTINCT[::-1])
    wish = run(val_set_size=0.2, max_samples=40)
    first, again, other = prepare(wish, straight, tokenizer), prepare(wish, straight, tokenizer), prepare(wish, turned, tokenizer)
    assert first == again
    assert texts(first.holdout, straight) == texts(other.holdout, turned)
    assert texts(first.train, straight) == texts(other.train, turned)
    assert numbers(prepare(run(val_set_size=0.2, seed=7), straight, tokenizer)) != numbers(
        prepare(run(val_set_size=0.2), straight, tokenizer)
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    picks=st.lists(st.sampled_from(["a", "A ", "b", "c c", "C  c", "d", "e", "f", "g"]), min_size=1, max_size=40),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 9),
)
def test_no_text_is_both_trained_and_held_out(tokenizer: Tokenizer, picks: list[str], share: float, seed: int) -> None:
    dataset = rows(picks)
    found = prepare(run(val_set_size=share, seed=seed), dataset, tokenizer)
    plain = [{" ".join(text.casefold().split()) for text in texts(part, dataset)} for part in (found.train, found.holdout)]
    assert not plain[0] & plain[1]
    assert found.train


def test_max_samples_counts_rows_that_are_used(tokenizer: Tokenizer) -> None:
    long = ["x" * 900 if number % 3 == 0 else f"short {number}" for number in range(90)]
    found = prepare(run(max_samples=50, val_set_size=10.0, max_length=200), rows(long), tokenizer)
    assert (len(found.train), len(found.holdout)) == (40, 10)
    assert found.facts.dropped["longer than max_length 200"] > 0
    assert found.facts.max_row_tokens <= 200


def test_rows_that_fall_away_are_counted_by_reason(tokenizer: Tokenizer) -> None:
    dataset = rows(["fine", "say <|im_end|>", "x" * 300, "good"])
    dataset = Dataset(dataset.rows, (data.Refusal(5, 9, "output", "the text is empty"),))
    facts = prepare(run(val_set_size=0.0, max_length=100), dataset, tokenizer).facts
    assert facts.rows == 5
    assert facts.train_rows == 2
    assert facts.dropped == {"longer than max_length 100": 1}
    assert facts.refused["the text is empty"] == 1
    assert sum(facts.refused.values()) == 2


def test_tokens_are_counted_over_what_is_trained(tokenizer: Tokenizer) -> None:
    found = prepare(run(val_set_size=0.25), rows(DISTINCT[:20]), tokenizer)
    assert found.facts.tokens == sum(len(row.input_ids) for row in found.train)
    assert found.facts.supervised_tokens == sum(sum(row.trained) for row in found.train)
    assert found.facts.supervised_tokens == sum(len(text) + 1 for text in texts(found.train, rows(DISTINCT[:20])))
    assert found.facts.holdout_tokens == sum(len(row.input_ids) for row in found.holdout)


def test_nothing_left_is_an_error_that_says_why(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"no row is left to train on \(2 rows: longer than max_length 16\); raise max_length"):
        prepare(run(max_length=16), rows(["a", "b"]), tokenizer)


def test_rows_of_eval_data_that_are_also_trained_are_not_measured(tokenizer: Tokenizer) -> None:
    found = prepare(run(), rows(DISTINCT[:20]), tokenizer, eval_dataset=rows(["Answer  number 3", "new", "newer"]))
    assert len(found.train) == 20
    assert [row.row for row in found.holdout] == [2, 3]
    assert found.facts.leaks == 1
    assert any("also trained on" in note for note in found.facts.notes)


def test_a_wish_to_stop_is_heard_and_progress_is_told(tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    prepare(run(), rows(DISTINCT), tokenizer, progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, 60)
    assert told[-1] == (60, 60)
    assert told == sorted(told)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        prepare(run(), rows(DISTINCT), tokenizer, stopping=stop)


def test_the_facts_of_a_dataset(tokenizer: Tokenizer, write_jsonl: Callable[..., Path]) -> None:
    def row(text: str) -> dict[str, object]:
        return {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}

    path = write_jsonl([*(row(f"answer {number}") for number in range(18)), row("Answer 3"), row("answer 3"), row("x" * 400), row("")])
    wish = RunConfig(data=(str(path),), max_length=120)
    facts = describe(wish, load(wish, lenient=True), tokenizer, 2)
    assert (facts["format"], facts["rows"], facts["usable"]) == ("messages", 22, 21)
    (fault,) = facts["refused"]
    assert (fault["row"], fault["line"], fault["field"]) == (22, 22, "messages[2].content")
    assert facts["turns_in"] == facts["turns_out"] == {"system": 21, "user": 21, "assistant": 21}
    assert facts["trained_turns"] == 21
    assert facts["duplicates"] == {"exact": 1, "near": 1}
    assert facts["too_long"] == {"rows": 1, "answer_lost": 0}
    assert facts["holdout"] == {"rows": 2, "leaks": 0}
    assert facts["tokens"]["max"] > 400 > facts["tokens"]["p50"]
    assert len(facts["examples"]) == 2
    example = facts["examples"][0]
    assert len(example["tokens"]) == len(example["trained"])
    assert example["trained_text"] == ["answer 0<|im_end|>"]
    assert "".join(example["tokens"]) == tokenizer.decode(example["ids"])


def test_an_answer_beyond_the_longest_row_is_told_apart(tokenizer: Tokenizer) -> None:
    chats = [Chat((Turn("user", "q" * 200), Turn("assistant", "a"))), Chat((Turn("user", "q"), Turn("assistant", "a" * 200)))]
    dataset = Dataset(tuple(Row(number, number, chat) for number, chat in enumerate(chats, 1)))
    assert describe(run(max_length=100), dataset, tokenizer, 0)["too_long"] == {"rows": 2, "answer_lost": 1}


def test_without_a_tokenizer_what_needs_one_is_null(write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> None:
    wish = RunConfig(data=(str(write_jsonl(chat_rows)),))
    facts = describe(wish, load(wish), None, 3)
    assert facts["usable"] == 40
    assert facts["holdout"] == {"rows": 4, "leaks": 0}
    assert [facts[name] for name in ("turns_out", "trained_turns", "tokens", "too_long")] == [None] * 4
    assert facts["examples"] == []


def test_no_usable_row_needs_no_note_about_the_hold_out(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"odd": 1}\n')
    wish = RunConfig(data=(str(path),))
    facts = describe(wish, load(wish, lenient=True), None)
    assert (facts["usable"], facts["notes"]) == (0, [])


def test_facts_and_preparing_agree(tokenizer: Tokenizer) -> None:
    words = [" ".join(random.Random(number).choices("abcdef", k=number % 90 + 1)) for number in range(120)]
    wish = run(max_length=150)
    facts, found = describe(wish, rows(words), tokenizer, 0), prepare(wish, rows(words), tokenizer)
    assert facts["holdout"]["rows"] == len(found.holdout)
    assert facts["too_long"]["rows"] == sum(found.facts.dropped.values())


def test_leaks_of_eval_data_are_counted_in_the_facts(tokenizer: Tokenizer) -> None:
    facts = describe(run(), rows(DISTINCT[:5]), tokenizer, 0, eval_dataset=rows(["answer number 1", "new"]))
    assert facts["holdout"] == {"rows": 1, "leaks": 1}

"""Nothing measured is trained: groups of like rows, copies, and what is kept of them; and rows kept on disk."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import Chat, Dataset, Row, Tokenizer, Turn, cache, describe, load, load_tokenizer, prepare
from qlora_tui.engine.data.boilerplate import boilerplate
from qlora_tui.engine.data.duplicates import ALIKE, groups
from qlora_tui.engine.data.fitting import exchanges_of
from qlora_tui.engine.data.holdout import size_of
from qlora_tui.engine.data.prints import Prints, likeness, words_of
from qlora_tui.engine.data.store import lengths_of, numbers_of
from qlora_tui.engine.places import place
from qlora_tui.engine.spec import RunConfig

VOCABULARY = [f"{first}{second}{third}" for first in "bdfgk" for second in "aeiou" for third in "lmnrst"]


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


def run(**changes: Any) -> RunConfig:
    return RunConfig(data=("x",), **{"max_length": 4096, **changes})


def sentence(number: int, words: int = 40) -> list[str]:
    return random.Random(number).choices(VOCABULARY, k=words)


def asked(question: Sequence[str], answer: Sequence[str], **more: Any) -> Chat:
    return Chat((Turn("user", " ".join(question)), Turn("assistant", " ".join(answer))), **more)


def dataset(chats: Sequence[Chat]) -> Dataset:
    return Dataset(tuple(Row(number, number, chat) for number, chat in enumerate(chats, 1)), format="messages", why="said")


def edited(words: list[str], seed: int) -> list[str]:
    """Change about one word in thirty, and the case."""
    shuffle = random.Random(seed)
    changed = list(words)
    changed[shuffle.randrange(len(words))] = "zzz"
    return [word.upper() for word in changed] if shuffle.random() < 0.5 else changed


def planted(originals: int, copies: int) -> tuple[list[Chat], dict[int, int]]:
    """Return distinct rows with `copies` edited copies among them, shuffled, and the row number of each row's partner."""
    chats = [(number, asked(sentence(number), sentence(number + 10**6))) for number in range(originals)]
    chats += [(number, asked(edited(sentence(number), number), edited(sentence(number + 10**6), number))) for number in range(copies)]
    random.Random(0).shuffle(chats)
    places: dict[int, list[int]] = {}
    for row, (number, _) in enumerate(chats, 1):
        places.setdefault(number, []).append(row)
    partners = {one: other for pair in places.values() if len(pair) == 2 for one, other in (pair, pair[::-1])}
    return [chat for _, chat in chats], partners


@pytest.mark.parametrize("seed", [1, 42])
def test_of_planted_near_duplicates_none_is_on_both_sides(tokenizer: Tokenizer, seed: int) -> None:
    chats, partners = planted(1000, 100)
    found = prepare(run(val_set_size=0.4, seed=seed), dataset(chats), tokenizer)
    held, trained = {*found.holdout.numbers}, {*found.train.numbers}
    assert sum(row in partners for row in held) >= 20
    assert [row for row in held if partners.get(row) in trained] == []
    assert found.facts.overlap == 0
    assert len(held) == 440


def test_near_duplicates_are_counted(tokenizer: Tokenizer) -> None:
    chats, _ = planted(300, 30)
    assert describe(run(), dataset([*chats, chats[0], chats[5]]), None)["duplicates"] == {"exact": 2, "near": 30}


def test_rows_of_one_conversation_stay_together(tokenizer: Tokenizer) -> None:
    chats = [asked(sentence(number), sentence(number + 500), source_id=f"talk {number // 4}") for number in range(80)]
    found = prepare(run(val_set_size=0.25), dataset(chats), tokenizer)
    talks = [{(row - 1) // 4 for row in side.numbers} for side in (found.train, found.holdout)]
    assert not talks[0] & talks[1]
    assert len(found.holdout) == 20


def test_a_long_instruction_around_every_text_does_not_make_the_rows_alike() -> None:
    prints = Prints(sketches=True)
    instruction = sentence(1, 60)
    for number in range(100):
        prints.add(asked([*instruction, *sentence(number + 10, 12)], sentence(number + 400, 6)))
    assert len({*groups(prints)}) == 100


def test_each_length_has_its_share_of_the_hold_out(tokenizer: Tokenizer) -> None:
    chats = [asked(sentence(number, 4), sentence(number + 900, 3 + number % 40)) for number in range(800)]
    found = prepare(run(val_set_size=0.1), dataset(chats), tokenizer)
    ordered = sorted([*found.train.lengths, *found.holdout.lengths])
    edges = [ordered[200], ordered[400], ordered[600]]
    counted = [sum(length >= edge for edge in edges) for length in found.holdout.lengths]
    assert all(15 <= counted.count(part) <= 25 for part in range(4)), [counted.count(part) for part in range(4)]


def test_the_size_of_a_share_has_a_floor_and_a_cap_and_says_so() -> None:
    notes: list[str] = []
    assert [size_of(rows, wanted, notes) for rows, wanted in ((1000, 0.1), (150, 0.1), (40, 0.1))] == [100, 15, 4]
    assert notes == []
    assert size_of(1000, 0.005, notes) == 20
    assert size_of(90_000, 0.1, notes) == 500
    assert [note[:20] for note in notes] == ["20 rows are held out", "500 rows are held ou"]


def test_eval_data_that_is_nearly_trained_on_is_not_measured(tokenizer: Tokenizer) -> None:
    trained = [asked(sentence(number), sentence(number + 50)) for number in range(20)]
    near = asked(edited(sentence(3), 1), edited(sentence(53), 2))
    measured = [trained[7], near, asked(sentence(800), sentence(801)), asked(sentence(802), sentence(803))]
    found = prepare(run(), dataset(trained), tokenizer, eval_dataset=dataset(measured))
    assert (list(found.holdout.numbers), found.facts.leaks, len(found.train)) == ([3, 4], 2, 20)
    lost = [json.loads(line) for line in found.lost.splitlines()]
    assert [(row["row"], row["of"]) for row in lost] == [(1, "eval_data"), (2, "eval_data")]
    assert describe(run(), dataset(trained), tokenizer, eval_dataset=dataset(measured))["holdout"] == {"rows": 2, "leaks": 2}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), min_size=2, max_size=12))
def test_a_group_holds_every_pair_that_is_alike(texts: list[list[str]]) -> None:
    prints = Prints(sketches=True)
    chats = [asked(["q"], text) for text in texts]
    for chat in chats:
        prints.add(chat)
    roots = groups(prints)
    assert all(roots[root] == root <= number for number, root in enumerate(roots))
    for number, chat in enumerate(chats):
        partners = [likeness(words_of(chat), words_of(other)) for other in chats if other is not chat]
        alone = roots.count(roots[number]) == 1
        assert alone or max(partners) > 0
        assert not alone or 1.0 not in partners


@pytest.mark.parametrize(("mode", "kept"), [("off", 42), ("exact", 41), ("near", 40)])
def test_copies_are_left_out_counted_and_listed(tokenizer: Tokenizer, mode: str, kept: int) -> None:
    chats = [asked(sentence(number), sentence(number + 100)) for number in range(40)]
    chats += [chats[4], asked(edited(sentence(9), 3), edited(sentence(109), 3))]
    found = prepare(run(filter_duplicates=mode, val_set_size=0.0), dataset(chats), tokenizer)
    assert len(found.train) == kept
    assert sum(found.facts.dropped.values()) == 42 - kept
    lost = [json.loads(line) for line in found.lost.splitlines()]
    expected = [{"row": 41, "reason": "copy of row 5"}, {"row": 42, "reason": "copy of row 10"}]
    assert lost == expected[: 42 - kept]


def test_a_question_answered_otherwise_is_no_copy(tokenizer: Tokenizer) -> None:
    question = sentence(1, 80)
    chats = [asked(question, sentence(number, 5)) for number in range(2, 5)] + [asked(question, sentence(2, 5))]
    found = prepare(run(filter_duplicates="near", val_set_size=0.0), dataset(chats), tokenizer)
    assert list(found.train.numbers) == [1, 2, 3]


def test_a_row_that_is_cut_ends_where_it_was_cut_and_a_lost_answer_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [asked(["q" * 150], ["a"]), asked(["q"], ["a" * 300]), asked(["q"], ["fits"])]
    whole = prepare(run(val_set_size=0.0), dataset(chats), tokenizer)
    found = prepare(run(val_set_size=0.0, max_length=120, too_long="cut"), dataset(chats), tokenizer)
    assert [(row.row, len(row.input_ids)) for row in found.train] == [(2, 120), (3, len(whole.train[2].input_ids))]
    assert list(found.train[0].input_ids) == list(whole.train[1].input_ids)[:120]
    assert found.train[0].trained == whole.train[1].trained[:120]
    assert found.facts.dropped == {"its whole answer lies beyond max_length 120": 1}
    assert found.facts.notes == ("1 rows were cut at max_length 120: their last answers have no end token.",)
    found.write_lost(tmp_path / "dropped.jsonl")
    (lost,) = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert (lost["row"], lost["tokens"]) == (1, len(whole.train[0].input_ids))


def talk(*lengths: int) -> Chat:
    turns = [Turn("system", "be kind")]
    for number, length in enumerate(lengths):
        turns += [Turn("user", f"question {number}"), Turn("assistant", chr(97 + number) * length)]
    return Chat(tuple(turns))


def test_a_long_chat_is_split_between_its_exchanges(tokenizer: Tokenizer) -> None:
    chats = [talk(50, 50, 50, 400, 60), talk(20), asked(["q"], ["x" * 500])]
    found = prepare(run(val_set_size=0.0, max_length=220, too_long="split"), dataset(chats), tokenizer)
    texts = [tokenizer.decode(row.input_ids) for row in found.train]
    assert list(found.train.numbers) == [1, 1, 1, 2]
    assert all(text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nquestion") for text in texts)
    assert all(length <= 220 for length in found.train.lengths)
    assert [sum(letter * 20 in text for text in texts) for letter in "abcde"] == [2, 1, 1, 0, 1]
    assert found.facts.dropped == {"one exchange longer than max_length 220": 1}
    assert any("split between turns into 3 rows" in note for note in found.facts.notes)
    assert any("1 exchanges of them are left out" in note for note in found.facts.notes)


def test_parts_of_one_chat_are_on_one_side(tokenizer: Tokenizer) -> None:
    roles: list[tuple[int, Any]] = [(part, role) for part in range(4) for role in ("user", "assistant")]
    chats = [Chat(tuple(Turn(role, f"{number} {part} " + "x" * 60) for part, role in roles)) for number in range(30)]
    found = prepare(run(val_set_size=0.3, max_length=250, too_long="split"), dataset(chats), tokenizer)
    assert len(found.train) + len(found.holdout) > 60
    assert not {*found.train.numbers} & {*found.holdout.numbers}


def test_with_masked_history_only_the_end_of_a_long_chat_is_kept(tokenizer: Tokenizer) -> None:
    found = prepare(run(val_set_size=0.0, max_length=300, too_long="split", mask_history=True), dataset([talk(90, 90, 90, 30)]), tokenizer)
    (row,) = found.train
    trained = tokenizer.decode([index for index, on in zip(row.input_ids, row.trained, strict=True) if on])
    assert trained == "d" * 30 + "<|im_end|>"
    assert "question 2" in tokenizer.decode(row.input_ids)


@given(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=12))
def test_exchanges_hold_every_turn_in_order(roles: list[Any]) -> None:
    turns = [Turn(role, str(number)) for number, role in enumerate(roles)]
    opening, exchanges = exchanges_of(turns)
    assert [*opening, *(turn for exchange in exchanges for turn in exchange)] == turns
    assert all(turn.role == "system" for turn in opening)
    assert all(any(turn.role == "user" for turn in exchange) for exchange in exchanges[1:])


def test_the_report_says_to_the_token_what_a_run_prepares(tokenizer: Tokenizer) -> None:
    chats, _ = planted(120, 20)
    for changes in ({}, {"max_length": 420, "filter_duplicates": "near"}, {"max_samples": 50, "max_length": 430, "too_long": "cut"}):
        wish, rows = run(**changes), dataset(chats)
        facts, found = describe(wish, rows, tokenizer)["prepared"], prepare(wish, rows, tokenizer)
        assert facts["tokens"] == sum(len(row.input_ids) for row in found.train)
        assert facts["supervised_tokens"] == sum(sum(row.trained) for row in found.train)
        assert (facts["train_rows"], facts["holdout_rows"]) == (len(found.train), len(found.holdout))
        assert facts["dropped"] == dict(found.facts.dropped)
        assert facts["steps_per_epoch"] == -(-len(found.train) // 16)


def test_the_report_says_that_a_run_may_leave_out_more(tokenizer: Tokenizer) -> None:
    plain, sifted = (describe(run(perplexity_filter=value), dataset(planted(30, 0)[0]), tokenizer) for value in (0.0, 3.0))
    assert sifted["prepared"] == plain["prepared"]
    assert [note[:17] for note in sifted["notes"] if note not in plain["notes"]] == ["perplexity_filter"]


def test_limits_tell_what_would_be_cut(tokenizer: Tokenizer) -> None:
    chats = [asked(["q"], ["a" * length]) for length in (10, 10, 10, 600)] + [asked(["q" * 600], ["a"])]
    facts = describe(run(max_length=512), dataset(chats), tokenizer)
    assert facts["limits"]["lengths"] == [{"max_length": 512, "longer": 0.4, "answer_lost": 0.2}]
    assert facts["limits"]["keeps_99"] == facts["tokens"]["max"]
    assert sum(each["rows"] for each in facts["histogram"]) == 5
    assert facts["histogram"][0]["rows"] == 3
    assert facts["supervised_share"] == facts["tokens"]["supervised"] / facts["tokens"]["total"]


def test_passages_that_many_rows_share_are_shown_with_their_words() -> None:
    passage = "As a friendly helper of this company I am always glad to help you with"
    opening: list[list[str]] = [passage.split(), [], [], []]
    chats = [asked(sentence(number, 20), [*opening[number % 4], *sentence(number + 77, 20)]) for number in range(80)]
    (found,) = boilerplate(dataset(chats).rows)
    assert (found["text"], found["role"], found["rows"], found["share"]) == (passage, "assistant", 20, 0.25)
    assert boilerplate(dataset([chats[0]] * 50).rows) == []


def test_a_passage_is_not_told_again_with_the_word_that_happens_to_follow_it() -> None:
    shared = "as a model I hold no view of my own but here is what I was told"
    chats = [asked([f"question {n}"], [f"{shared} {'red' if n % 3 else 'blue'} {n} {n * n} {n + 7}"]) for n in range(60)]
    assert [found["text"] for found in boilerplate(dataset(chats).rows)] == [shared]


def test_a_second_run_takes_the_rows_from_the_disk(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset([asked(sentence(number), sentence(number + 100)) for number in range(30)])
    first = prepare(run(), rows, tokenizer)
    monkeypatch.setattr(cache, "_write", None)
    assert prepare(run(), rows, tokenizer) == first
    with pytest.raises(TypeError):
        prepare(run(seed=1), rows, tokenizer)


@pytest.mark.parametrize("name", ["ids", "mask", "facts", "train", "sums.json"])
def test_a_damaged_entry_is_built_anew(tokenizer: Tokenizer, name: str) -> None:
    rows = dataset([asked(sentence(number), sentence(number + 100)) for number in range(30)])
    first = prepare(run(), rows, tokenizer)
    expected = [*first.train], [*first.holdout], first.facts
    (path,) = (place("cache") / "rows").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    again = prepare(run(), rows, tokenizer)
    assert ([*again.train], [*again.holdout], again.facts) == expected
    (path,) = (place("cache") / "rows").glob(f"*/{name}")
    assert path.read_bytes() != content


def test_two_runs_build_the_same_entry_once(tokenizer: Tokenizer) -> None:
    built: list[str] = []
    begun, release = threading.Event(), threading.Event()

    def build(ids: Any, mask: Any) -> dict[str, bytes]:
        built.append(threading.current_thread().name)
        begun.set()
        release.wait(10)
        ids.write(b"1234")
        return {"facts": b"{}"}

    first = threading.Thread(target=lambda: cache.kept("a" * 32, build))
    first.start()
    assert begun.wait(10)
    waited: list[int] = []

    def stopping() -> None:
        waited.append(1)
        if len(waited) == 2:
            release.set()

    columns = cache.kept("a" * 32, build, stopping)
    first.join()
    assert len(built) == 1
    assert bytes(columns["ids"]) == b"1234"


def test_a_home_that_cannot_be_written_costs_only_the_cache(tokenizer: Tokenizer, home: Path) -> None:
    rows = dataset([asked(sentence(number), sentence(number + 100)) for number in range(30)])
    home.write_text("a file where a folder should be")
    found = prepare(run(), rows, tokenizer)
    home.unlink()
    assert prepare(run(), rows, tokenizer) == found


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old", "older"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ids").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".building-x").mkdir()
    os.utime(tmp_path / ".building-x", (1, 1))
    cache.prune(tmp_path, keep="older", most=200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older"]


def test_rows_of_a_store_are_those_that_were_written(tokenizer: Tokenizer) -> None:
    found = prepare(run(val_set_size=0.0), dataset([asked(["q"], ["a" * number]) for number in range(1, 9)]), tokenizer).train
    listed = [*found]
    assert [found[place] for place in range(-8, 8)] == listed * 2
    assert [*found[2:5]] == listed[2:5]
    assert list(lengths_of(found)) == lengths_of(listed)
    assert list(numbers_of(found)) == numbers_of(listed)
    with pytest.raises(IndexError):
        found[8]


def test_the_settings_that_decide_what_is_trained_are_in_the_key(tokenizer: Tokenizer, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl({"prompt": f"say {number}", "completion": "x" * number} for number in range(1, 60))
    entries = set()
    each: list[dict[str, Any]] = [{}, {"max_length": 100}, {"too_long": "cut"}, {"seed": 3}, {"val_set_size": 0.2}, {"mask_history": True}]
    for changes in [*each, {"max_samples": 9}]:
        wish = RunConfig(data=(str(path),), **changes)
        prepare(wish, load(wish), tokenizer)
        entries.add(len([*(place("cache") / "rows").glob("[!.]*")]))
    assert entries == {1, 2, 3, 4, 5, 6, 7}


def test_word_pairs_are_what_likeness_counts() -> None:
    assert likeness(["a", "b", "c", "d"], ["a", "b", "c", "d"]) == 1
    assert likeness(["a", "b", "c", "d"], ["a", "b", "x", "d"]) == 0.2
    assert 0 < ALIKE < 1

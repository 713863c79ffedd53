"""Rows rendered many at a time are the rows rendered one by one: tokens, masks, refusals and their order."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, Family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import Chat, Dataset, Renderer, Row, Tokenizer, TokenRow, Turn, ahead, load_tokenizer, prepare
from qlora_tui.engine.data.prints import KEPT, Sketches
from qlora_tui.engine.errors import BadRow
from qlora_tui.engine.spec import RunConfig

Make = Callable[..., Tokenizer]
CORPUS = ["the answer is the\n\nthe other answer, and then some more of the same in the end", "was ist das für eine Antwort?\n\n"] * 3


def write(folder: Path, family: Family, *, words: bool = False) -> Path:
    """Write a tokenizer folder for a family: bytes with learned merges, or a handful of words that cannot say any other."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if words:
        backend = Backend(models.WordLevel(vocab={"yes": 0, "no": 1, "why": 2}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": family.bos, "eos_token": family.eos, "chat_template": family.template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {key: value for key, value in config.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[object, Tokenizer] = {}

    def make_one(name: str, **kind: bool) -> Tokenizer:
        if (name, *kind) not in made:
            made[name, *kind] = load_tokenizer(write(tmp_path_factory.mktemp("tokenizer") / "model", FAMILIES[name], **kind))
        return made[name, *kind]

    return make_one


def one_by_one(renderer: Renderer, rows: Sequence[Row]) -> list[TokenRow | str]:
    found: list[TokenRow | str] = []
    for row in rows:
        try:
            found.append(renderer.tokens(row))
        except BadRow as error:
            found.append(str(error))
    return found


def many(renderer: Renderer, rows: Sequence[Row]) -> list[TokenRow | str]:
    found = list(ahead.rendered(renderer, rows))
    assert [row for row, _ in found] == list(rows)
    return [str(tokens) if isinstance(tokens, BadRow) else tokens for _, tokens in found]


def texts(family: Family) -> st.SearchStrategy[str]:
    """Texts of all kinds, some with a token that would end a turn in the middle of it."""
    plain = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["the answer", " then\n", "yes", "ü  ", "😀"])
    return plain | st.sampled_from([f"a{token}b" for token in family.specials])


def chats(family: Family) -> st.SearchStrategy[Chat]:
    said = texts(family)
    flags = st.booleans()
    turns = st.lists(st.tuples(said, said, flags), min_size=1, max_size=3).map(
        lambda pairs: tuple(turn for ask, reply, flag in pairs for turn in (Turn("user", ask), Turn("assistant", reply, flag)))
    )
    system = st.builds(lambda text, rest: (Turn("system", text), *rest), said, turns)
    ids = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 1)), max_size=6).map(
        lambda pairs: Chat((), ids=(tuple(index for index, _ in pairs), tuple(flag for _, flag in pairs)))
    )
    pieces = st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), said), max_size=4).map(
        lambda given: Chat(tuple(given), verbatim="segments")
    )
    whole = st.builds(lambda text: Chat((Turn("assistant", text),), verbatim="text"), said)
    pair = st.builds(lambda ask, reply: Chat((Turn("user", ask), Turn("assistant", reply)), plain=True), said, said)
    return st.one_of(st.one_of(turns, system).map(Chat), ids, pieces, whole, pair)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), masked=st.booleans(), at_once=st.integers(1, 5))
def test_many_at_a_time_and_one_by_one_are_the_same(make: Make, name: str, data: st.DataObject, masked: bool, at_once: int) -> None:
    rows = [Row(number, number, found) for number, found in enumerate(data.draw(st.lists(chats(FAMILIES[name]), max_size=12)), 1)]
    expected = Renderer(make(name), mask_history=masked)
    renderer = Renderer(make(name), mask_history=masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "ROWS_AT_ONCE", at_once)
        assert many(renderer, rows) == one_by_one(expected, rows)
    assert renderer.notes() == expected.notes()


def test_a_row_that_cannot_be_encoded_costs_no_other(make: Make) -> None:
    said = enumerate(["yes", "x", "no"], 1)
    rows = [Row(number, number, Chat((Turn("assistant", f"why {text} "),), verbatim="text")) for number, text in said]
    found = many(Renderer(make("chatml", words=True)), rows)
    assert [isinstance(each, TokenRow) for each in found] == [True, False, True]
    assert "cannot read it" in str(found[1])


def test_a_piece_holds_few_rows_and_few_characters(make: Make) -> None:
    renderer = Renderer(make("chatml"))
    rows = [
        Row(number, number, Chat((Turn("user", "a"), Turn("assistant", "b" * size))))
        for number, size in enumerate([200_000] * 4 + [1] * 600, 1)
    ]
    pieces = [len(piece) for piece in ahead._pieces(renderer, rows)]
    assert pieces[:2] == [2, 2]
    assert max(pieces) == ahead.ROWS_AT_ONCE
    assert sum(pieces) == len(rows)


def test_no_more_rows_are_read_than_may_be_used(make: Make) -> None:
    read: list[int] = []

    class Counted(list[Row]):
        def __iter__(self) -> Any:
            for row in super().__iter__():
                read.append(row.number)
                yield row

        def __getitem__(self, place: Any) -> Any:
            found = super().__getitem__(place)
            read.append(found.number)
            return found

    rows = Counted(Row(number, number, Chat((Turn("user", "why"), Turn("assistant", f"no {number}")))) for number in range(1, 2001))
    run = RunConfig(data=("x",), max_samples=10, val_set_size=0)
    prepared = prepare(run, Dataset(rows), make("chatml"))
    assert len(prepared.train) == 10
    rendered = read[-10:]
    assert sorted(row.row for row in prepared.train) == sorted(rendered)
    assert len(read) == len(rows) * 2 + 10  # once for the key, once to shuffle them, and the ten


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60).map(str), max_size=120), max_size=8), st.integers(1, 200))
def test_sketches_keep_the_smallest_hashes_of_each_row(rows: list[list[str]], at_once: int) -> None:
    together, alone = Sketches(), [Sketches() for _ in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_tui.engine.data.prints._WORDS_AT_ONCE", at_once)
        for words, one in zip(rows, alone, strict=True):
            together.add(words)
            one.add(words)
        values, ends, tops = together.columns
    begins = [0, *ends]
    for place, (words, one) in enumerate(zip(rows, alone, strict=True)):
        mine, _, (top,) = one.columns
        assert list(values[begins[place] : begins[place + 1]]) == list(mine) == sorted({*mine})
        assert tops[place] == top
        pairs = {*itertools.pairwise(words)} if len(words) != 1 else {(words[0], "")}
        assert len(mine) == min(len(pairs), KEPT)
        assert (top == 2**32) == (len(pairs) <= KEPT)


def test_sketches_tell_how_much_two_rows_share() -> None:
    draw = random.Random(1)
    words = [str(draw.randrange(10**9)) for _ in range(400)]
    found = Sketches()
    for row in (words, words[:-1], words[200:]):
        found.add(row)
    values, ends, _ = found.columns
    first, second, third = ({*values[begin:end]} for begin, end in zip([0, *ends], ends, strict=False))
    assert len(first & second) >= KEPT - 1
    assert KEPT / 4 < len(first & third) < KEPT * 3 / 4

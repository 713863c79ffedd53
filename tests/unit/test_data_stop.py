"""A wish to stop is heard between small units of work, wherever in reading and preparing it comes; no clock is asked."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import aside, hub
from qlora_tui.engine.data import Chat, Dataset, Row, Tokenizer, Turn, ahead, duplicates, load, load_tokenizer, prepare, row_store, tape
from qlora_tui.engine.data.holdout import leaks
from qlora_tui.engine.data.hub_rows import read_hub
from qlora_tui.engine.data.prints import Prints
from qlora_tui.engine.data.tape import Tape
from qlora_tui.engine.errors import ConfigErrors, Stopped
from qlora_tui.engine.places import place
from qlora_tui.engine.preflight import check
from qlora_tui.engine.spec import RunConfig

ROWS = 600


class Looks:
    """What is asked whether to stop: counts by asker, and stops at the look of that number."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at
        self.count = 0
        self.by: Counter[str] = Counter()

    def __call__(self) -> None:
        self.count += 1
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_name in ("polled", "look", "_polled"):
            frame = frame.f_back
        self.by[frame.f_code.co_name] += 1
        if self.count == self.stop_at:
            raise Stopped("enough")


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every unit of work so small that a few hundred rows are many of them."""
    monkeypatch.setattr(tape, "_LOOK_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 50)
    monkeypatch.setattr(duplicates, "_VALUES_AT_ONCE", 500)
    monkeypatch.setattr("qlora_tui.engine.data.cache._BLOCK_BYTES", 2**10)
    monkeypatch.setattr("qlora_tui.engine.data.holdout._TEXTS_AT_ONCE", 50)


def dataset(count: int = ROWS) -> Dataset:
    """Return rows of which every fifth is nearly the one before it."""
    draw = random.Random(0)
    words = [f"{first}{second}{third}" for first in "bdfgk" for second in "aeiou" for third in "lmnrst"]
    said = [" ".join(draw.choices(words, k=30)) for _ in range(count)]
    said[1::5] = [f"{before} indeed" for before in said[::5]][: len(said[1::5])]
    return Dataset(tuple(Row(number, number, Chat((Turn("user", "Say"), Turn("assistant", text)))) for number, text in enumerate(said, 1)))


def run(**changes: Any) -> RunConfig:
    return RunConfig(data=("x",), **{"max_length": 512, "val_set_size": 0.1, **changes})


def chat_line(number: int) -> str:
    return json.dumps({"prompt": f"question {number}?", "completion": f"answer {number * 7}"}) + "\n"


def written(path: Path, count: int) -> Path:
    """Write rows of the kind that the name says."""
    import gzip

    import pyarrow
    from pyarrow import ipc, parquet

    rows = [json.loads(chat_line(number)) for number in range(count)]
    if path.suffix == ".jsonl":
        path.write_text("".join(map(chat_line, range(count))))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(map(chat_line, range(count))).encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"q{number},a{number}\n" for number in range(count)))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return path


@pytest.mark.parametrize(
    ("name", "between"),
    [("a.jsonl", 1), ("a.jsonl.gz", 1), ("a.json", 1), ("a.csv", 1), ("a.parquet", 256), ("a.arrow", 256)],
)
def test_reading_is_asked_to_stop_between_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, between: int) -> None:
    path = written(tmp_path / name, 1200)
    seen = [0, 0, 0]  # rows since the last look, most of them, looks
    add = row_store.Pile.add

    def counted(self: row_store.Pile[Any], item: Any) -> bytes:
        seen[0] += 1
        seen[1] = max(seen[:2])
        return add(self, item)

    def look() -> None:
        seen[0], seen[2] = 0, seen[2] + 1

    monkeypatch.setattr(row_store.Pile, "add", counted)
    found = load(RunConfig(data=(str(path),)), stopping=look)
    assert len(found.rows) == 1200
    assert seen[1] <= between + 64  # the rows looked at ahead to find the format
    assert seen[2] >= 1200 // between


@pytest.mark.parametrize("at", [1, 2, 50, 700])
def test_a_wish_to_stop_ends_reading_at_that_very_look(tmp_path: Path, at: int) -> None:
    looks = Looks(at)
    with pytest.raises(Stopped, match="enough"):
        load(RunConfig(data=(str(written(tmp_path / "a.jsonl", 1200)),)), stopping=looks)
    assert looks.count == at


def test_rows_that_name_their_parents_are_joined_in_steps(tmp_path: Path) -> None:
    path = tmp_path / "chained.jsonl"
    rows = [{"id": str(n), "parent_id": str(n - 1) if n % 3 else "", "prompt": f"q{n}", "completion": f"a{n}"} for n in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    looks = Looks()
    assert len(load(RunConfig(data=(str(path),), data_format="chained"), stopping=looks).rows) == 100
    assert looks.by["_spread"] >= 300 // 16
    assert looks.by["results"] >= 2 * (300 // 16)


def stages(tokenizer: Tokenizer, count: int, **changes: Any) -> Looks:
    looks = Looks()
    prepare(run(seed=count, **changes), dataset(count), tokenizer, stopping=looks)
    return looks


def test_every_stage_of_preparing_is_asked_and_twice_as_often_for_twice_the_rows(tokenizer: Tokenizer) -> None:
    few, many = stages(tokenizer, ROWS), stages(tokenizer, 2 * ROWS)
    growing = {"_digest", "_looked_up", "_common", "_candidates", "_alike", "_sum", "_draw"}
    assert growing <= few.by.keys()
    for stage in growing - {"_digest", "_draw"}:  # packed rows go by blocks, and the draw ends when it has enough
        assert many.by[stage] >= 1.5 * few.by[stage], stage
    assert {"equal", "_locked"} <= few.by.keys()


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"filter_duplicates": "exact"}, {"_copies"}),
        ({"filter_duplicates": "near"}, {"_copies", "pairs"}),
        ({"max_samples": 100}, {"_shuffled"}),
    ],
)
def test_what_is_done_on_request_is_asked_too(tokenizer: Tokenizer, changes: dict[str, Any], asked: set[str]) -> None:
    found = stages(tokenizer, ROWS, **changes)
    assert all(found.by[stage] >= ROWS // 50 or stage == "pairs" for stage in asked)
    assert asked <= found.by.keys()


def test_a_wish_to_stop_is_obeyed_at_whatever_look_it_comes_and_leaves_nothing(tokenizer: Tokenizer) -> None:
    rows = dataset(120)
    whole = Looks()
    prepare(run(seed=7), rows, tokenizer, stopping=whole)
    for at in range(1, whole.count + 1, max(1, whole.count // 20)):
        looks = Looks(at)
        with pytest.raises(Stopped, match="enough"):
            prepare(run(seed=1000 + at), rows, tokenizer, stopping=looks)
        assert looks.count == at
    entries = [entry.name for entry in (place("cache") / "rows").iterdir()]
    assert not [name for name in entries if name.startswith(".building")]
    assert threading.active_count() < 10


def test_measured_rows_are_compared_in_steps() -> None:
    prints = Prints(sketches=True)
    for row in dataset(400).rows:
        prints.add(row.chat)
    for at in range(1, 12):
        looks = Looks(at)
        with pytest.raises(Stopped, match="enough"):
            leaks(prints, 100, looks)
        assert looks.count == at


def test_the_size_of_the_steps_changes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = Prints(sketches=True)
    for row in dataset(400).rows:
        prints.add(row.chat)
    in_steps = duplicates.groups(prints)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 10**6)
    monkeypatch.setattr(duplicates, "_VALUES_AT_ONCE", 10**9)
    assert duplicates.groups(prints) == in_steps
    assert [place for place, root in enumerate(in_steps) if root != place][:3] == [1, 6, 11]


def test_rows_on_the_disk_and_in_memory_are_known_by_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset(300).rows
    monkeypatch.setattr(row_store, "HELD_BYTES", 0)
    monkeypatch.setattr(row_store, "_BLOCK_BYTES", 1000)
    pile = row_store.rows()
    for row in rows:
        pile.add(row)
    stored = pile.done()
    assert isinstance(stored, row_store.Stored)
    assert tuple(stored) == rows
    assert len(list(row_store.packed(stored))) < len(rows) < len(b"".join(row_store.packed(stored)))
    assert b"".join(row_store.packed(stored)) == b"".join(row_store.packed(rows)) == b"".join(row_store.packed(stored[:]))


def test_a_long_text_is_not_waited_for(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    encode = Tokenizer.encode_many

    def slow(self: Tokenizer, texts: Any) -> Any:
        gate.wait(20)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_many", slow)
    monkeypatch.setattr(ahead, "_LOOK_EVERY_SECONDS", 0.001)
    try:
        with pytest.raises(Stopped, match="enough"):
            prepare(run(), dataset(20), tokenizer, stopping=Looks(20))
    finally:
        gate.set()


def test_work_aside_is_left_behind_at_a_wish_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "LOOK_EVERY_SECONDS", 0.001)
    gate = threading.Event()
    looks = Looks(5)
    with pytest.raises(Stopped, match="enough"):
        aside.aside(lambda: gate.wait(20), looks)
    assert looks.count == 5
    gate.set()
    assert aside.aside(lambda: 7, lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        aside.aside(lambda: 1 // 0, lambda: None)


def test_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(hub, "_info", lambda *_, **__: gate.wait(20))
    monkeypatch.setattr(hub, "_offline", lambda: False)
    monkeypatch.setattr(aside, "LOOK_EVERY_SECONDS", 0.001)
    try:
        with pytest.raises(Stopped, match="enough"):
            hub.small_files("owner/name", "main", Looks(4))
        polls = iter([False, False, True])
        with pytest.raises(Stopped, match="stopped while fetching owner/name"):
            hub.weights("owner/name", "main", "", lambda done, total: None, lambda: next(polls))
    finally:
        gate.set()


def test_a_dataset_of_the_hub_is_fetched_in_a_process_that_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text("".join(map(chat_line, range(5))))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped, match="enough"):
        list(read_hub("owner/name", Tape(0, Looks(1))))
    assert not list(place("cache").glob(".hub-*"))


def test_a_check_before_a_run_can_be_stopped_and_tells_how_far_it_is(
    tiny_model: Path, tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]
) -> None:
    path = write_jsonl(chat_rows)
    asked = RunConfig(model_name_or_path=str(tiny_model), data=(str(path),), runs_dir=str(tmp_path / "runs"), max_length=64)
    told: list[tuple[int, int]] = []
    check(asked, fit=False, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert told[-1] == (size, size)
    assert told == sorted(told)
    with pytest.raises(Stopped, match="enough"):
        check(asked, stopping=Looks(3))


def test_wrong_weights_are_refused_before_anything_is_read(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("no row\n")
    asked = RunConfig(
        model_name_or_path=str(tiny_model), data=(str(path), str(path)), data_weights=("1",), runs_dir=str(tmp_path / "runs"), max_length=64
    )
    with pytest.raises(ConfigErrors) as caught:
        check(asked, progress=lambda done, total: pytest.fail("it was read"))
    assert [str(problem) for problem in caught.value.problems] == [
        "data_weights: 1 weights for 2 sources of data; give each source one, in their order"
    ]

"""Files of every kind: the right rows of each, broken ones named by line, and none of them held in memory."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import Chat, Dataset, Refusal, Row, Turn, absolute, load, load_eval, mixture, row_store, train_alone
from qlora_tui.engine.data.reader import read_file
from qlora_tui.engine.errors import BadRow, ConfigError, DataError, SpaceError, Stopped
from qlora_tui.engine.spec import RunConfig

ROWS = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(5)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


def run(path: Path | str, **changes: Any) -> RunConfig:
    return RunConfig(data=(str(path),), **changes)


def answers(data: Dataset | None) -> list[str]:
    assert data is not None
    return [row.chat.turns[-1].content for row in data.rows]


def prompt_completions(path: Path, **changes: Any) -> list[tuple[str, str]]:
    rows = load(run(path, data_format="prompt-completion", **changes)).rows
    return [(row.chat.turns[0].content, row.chat.turns[1].content) for row in rows]


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def jsonl(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=2)
    return sink.getvalue()


def arrow(rows: Sequence[Mapping[str, object]], *, stream: bool = False) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(rows))
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def table(rows: Sequence[Mapping[str, object]], **dialect: Any) -> str:
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, list(rows[0]), **dialect)
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue()


KINDS: dict[str, bytes] = {
    "rows.jsonl": TEXT.encode(),
    "rows.ndjson": TEXT.encode(),
    "no-ending": TEXT.encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "pretty.json": b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode() + b"\n",
    "rows.csv": table(ROWS).encode(),
    "bom.csv": b"\xef\xbb\xbf" + table(ROWS).encode(),
    "semicolons.csv": table(ROWS, delimiter=";").encode(),
    "rows.tsv": table(ROWS, delimiter="\t").encode(),
    "rows.TSV": table(ROWS, delimiter="\t", lineterminator="\n").encode(),
    "rows.jsonl.gz": gzip.compress(TEXT.encode()),
    "two-members.jsonl.gz": gzip.compress(jsonl(ROWS[:2]).encode()) + gzip.compress(jsonl(ROWS[2:]).encode()),
    "packed-without-saying-so.jsonl": gzip.compress(TEXT.encode()),
    "rows.jsonl.zst": zstd(TEXT.encode()),
    "two-frames.jsonl.zst": zstd(jsonl(ROWS[:2]).encode()) + zstd(jsonl(ROWS[2:]).encode()),
    "rows.csv.gz": gzip.compress(table(ROWS).encode()),
    "rows.json.zst": zstd(json.dumps(ROWS).encode()),
    "rows.parquet": parquet(ROWS),
    "rows.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, stream=True),
    "parquet-without-saying-so.jsonl": parquet(ROWS),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    data = load(run(written(tmp_path / name, KINDS[name])))
    assert [(row.number, row.chat) for row in data.rows] == [
        (number, Chat((Turn("user", f"q{number - 1}"), Turn("assistant", f"a{number - 1}")), plain=True)) for number in range(1, 6)
    ]
    assert not data.refused
    assert data.sources[0].rows == 5


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith((".gz", ".zst"))])
def test_a_compressed_file_that_is_cut_off_is_refused_whole(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, KINDS[name][:-3])
    with pytest.raises(DataError, match=f"^{path}: the compressed file ends before its end; was it copied whole"):
        load(run(path, skip_bad_rows=True), lenient=True)


@pytest.mark.parametrize(("name", "start"), [("rows.jsonl.gz", b"\x1f\x8b\x08\x00"), ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd")])
def test_a_compressed_file_that_is_damaged_is_refused_whole(tmp_path: Path, name: str, start: bytes) -> None:
    path = written(tmp_path / name, start + b"\xff" * 200)
    with pytest.raises(DataError, match="the compressed file is damaged"):
        load(run(path))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("kept", [0.1, 0.6, 0.97])
def test_a_table_file_that_is_cut_off_is_refused_whole(tmp_path: Path, name: str, kept: float) -> None:
    path = written(tmp_path / name, KINDS[name][: int(len(KINDS[name]) * kept)])
    with pytest.raises(DataError, match=r"rows\.\w+: the \w+ file is damaged or cut off \(.*copy or write it again"):
        load(run(path, skip_bad_rows=True), lenient=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["rows.parquet", "rows.arrow", "stream.arrow", "rows.jsonl.zst", "rows.jsonl.gz", "rows.json", "rows.csv"]),
    place=st.integers(0, 10_000),
    value=st.integers(0, 255),
)
def test_one_changed_byte_never_breaks_the_reader(tmp_path: Path, name: str, place: int, value: int) -> None:
    content = bytearray(KINDS[name])
    content[place % len(content)] = value
    path = written(tmp_path / name, bytes(content))
    try:
        data = load(run(path, skip_bad_rows=True, data_format="prompt-completion"), lenient=True)
    except DataError:
        return
    assert len(data.rows) + len(data.refused) <= len(content)  # a byte that unpacks to line breaks breaks every line


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.jsonl.gz", "rows.csv.zst"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    packed = gzip.compress(content) if name.endswith(".gz") else zstd(content) if name.endswith(".zst") else content
    with pytest.raises(DataError, match=f"{name}: there is no row in it"):
        load(run(written(tmp_path / name, packed)))


def test_a_list_without_items_and_a_table_without_rows_are_told(tmp_path: Path) -> None:
    schema = pa.schema([("prompt", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    for path in (
        written(tmp_path / "rows.json", "[ ]\n"),
        written(tmp_path / "rows.csv", "prompt,completion\n"),
        tmp_path / "empty.parquet",
    ):
        with pytest.raises(DataError, match="there is no row in it"):
            load(run(path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"BZh91AY", "a bzip2 file is not read here; unpack|a bzip2 file is not read here; write it as JSONL"),
        ("a.xlsx", b"PK\x03\x04", "a ZIP archive or spreadsheet is not read here; write it as JSONL"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16"), "a UTF-16 file is not read here; save it as UTF-8"),
        ("a.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "a file compressed twice is not read here; unpack it first"),
        ("a.gz", gzip.compress(KINDS["rows.parquet"], mtime=0), "a Parquet file inside a compressed one is not read here; unpack it first"),
        ("a.json", b'{\n "data": [1]\n}', "the file holds one JSON object and not rows; write its rows as a JSON list"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load(run(path, skip_bad_rows=True), lenient=True)
    assert any(str(caught.value).startswith(f"{path}: {part}") for part in sentence.split("|"))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="this is no file"):
        load(run(tmp_path / "pipe.jsonl"))


# JSON lists


def test_each_item_of_a_list_has_its_line(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.json", '[\n{"prompt": "a\\n", "completion": "b"},\n5, {"prompt": "a",\n"completion": 1.10}\n]\n\n')
    data = load(run(path, skip_bad_rows=True))
    assert [(row.number, row.line) for row in data.rows] == [(1, 2), (3, 3)]
    assert [(fault.row, fault.line) for fault in data.refused] == [(2, 3)]
    assert answers(data) == ["b", "1.10"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('[{"prompt": "a"},\n{"prompt": }]', "Expecting value at line 2"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', "a comma or the end of the list was expected at line 2"),
        ('[{"prompt": "a"},\n\n', "Expecting value at line 3"),
        ('[{"prompt": "a"}', "a comma or the end of the list was expected at line 1"),
        ('[{"prompt": "a"}]\n\nmore', "something follows the end of the list at line 3"),
        ('[{"prompt": "a}]', "Unterminated string starting at at line 1"),
        ("[", "Expecting value at line 1"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(tmp_path: Path, content: str, fault: str) -> None:
    path = written(tmp_path / "rows.json", content)
    with pytest.raises(DataError) as caught:
        load(run(path, skip_bad_rows=True))
    assert str(caught.value) == f"{path}: the JSON list is broken: {fault}; write it as JSONL and only the broken row is lost"


def test_a_list_that_is_no_text_or_nested_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file is not UTF-8 \(near byte 4\)"):
        load(run(written(tmp_path / "rows.json", b'[{"\xff": 1}]')))
    with pytest.raises(DataError, match="nested too deeply"):
        load(run(written(tmp_path / "rows.json", "[" * 100_000)))


def test_one_item_may_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine.data import raw

    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 2**20)
    path = written(tmp_path / "rows.json", '[{"prompt": "' + "x" * 5 * 2**20)
    with pytest.raises(DataError, match="one item of the JSON list, at line 1, is broken or longer than 1 MiB"):
        load(run(path))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=12),
    block=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
)
def test_a_list_reads_the_same_wherever_the_blocks_of_a_file_end(tmp_path: Path, texts: list[str], block: int, indent: int | None) -> None:
    from qlora_tui.engine.data import json_rows

    values = [{"text": text, "n": index} for index, text in enumerate(texts)]
    content = json.dumps(values, ensure_ascii=False, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BLOCK_BYTES", block)
        found = list(json_rows.read_list(io.BytesIO(content.encode()), "rows.json"))
    assert [raw.fields for raw in found] == values
    assert [raw.line for raw in found] == ([1] * len(texts) if indent is None else [2 + 4 * index for index in range(len(texts))])


# CSV and TSV


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=6),
    delimiter=st.sampled_from([",", ";", "|", "\t"]),
)
def test_texts_of_a_table_arrive_as_they_were_written(tmp_path: Path, texts: list[str], delimiter: str) -> None:
    rows = [{"prompt": text, "completion": text} for text in texts]
    path = written(tmp_path / "rows.csv", table(rows, delimiter=delimiter, quoting=csv.QUOTE_ALL))
    assert prompt_completions(path) == [(text, text) for text in texts]


def test_line_breaks_inside_quotes_belong_to_the_text_and_lines_are_counted(tmp_path: Path) -> None:
    content = '\nprompt,completion\n"two\nlines","a ""quoted"" word"\n\nq,b\n"x\r\ny",c\nq,d\n'
    data = load(run(written(tmp_path / "rows.csv", content)))
    assert [(row.line, row.chat.turns[0].content) for row in data.rows] == [(3, "two\nlines"), (6, "q"), (7, "x\r\ny"), (9, "q")]
    assert answers(data) == ['a "quoted" word', "b", "c", "d"]


def test_texts_that_a_spreadsheet_would_run_are_texts(tmp_path: Path) -> None:
    evil = ["=1+2", "@SUM(A1)", "+1", "-2+3", "=cmd|' /C calc'!A0", "007", "1e5", "TRUE", "\tx"]
    rows = [{"prompt": text, "completion": text} for text in evil]
    assert prompt_completions(written(tmp_path / "rows.csv", table(rows))) == [(text, text) for text in evil]


def test_broken_lines_of_a_table_are_refused_by_line_and_the_others_kept(tmp_path: Path) -> None:
    lines = [b"prompt,completion", b"a,1", b"a", b"a,b,c", b'"say "hi" now",x', b"\xff,x", b"b,2", b'"open,x', b"c,3"]
    path = written(tmp_path / "rows.csv", b"\n".join(lines) + b"\n")
    data = load(run(path, skip_bad_rows=True))
    assert answers(data) == ["1", "2"]
    assert [(fault.line, fault.reason) for fault in data.refused] == [
        (3, "it has 1 columns and the first line names 2; a text that holds the delimiter needs quotes"),
        (4, "it has 3 columns and the first line names 2; a text that holds the delimiter needs quotes"),
        (5, 'text follows a closing quote; write a quote inside a text as ""'),
        (6, "line 6 is not UTF-8 (byte 1); save the file as UTF-8"),
        (8, 'a quote that opens in line 8 is never closed (lines 8 to 9); write a quote inside a text as ""'),
    ]
    with pytest.raises(BadRow, match=f"^{path}, row 2, line 3: it has 1 columns"):
        load(run(path))


def test_a_cell_or_line_that_is_too_long_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine.data import raw

    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 2**20)
    long = "x" * 3 * 2**20
    path = written(tmp_path / "rows.csv", f"prompt,completion\na,{'y' * 200_000}\na,{long}\nb,2\n")
    data = load(run(path, skip_bad_rows=True))
    assert [row.line for row in data.rows] == [2, 4]
    assert data.refused[0].reason.startswith("the line is longer than 1 MiB")


def test_columns_without_a_name_get_one_and_names_said_twice_are_refused(tmp_path: Path) -> None:
    found = list(read_file(written(tmp_path / "pandas.csv", ",prompt,completion\n0,a,b\n")))
    assert [raw.fields for raw in found] == [{"column 1": "0", "prompt": "a", "completion": "b"}]
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        load(run(written(tmp_path / "twice.csv", "prompt, prompt,completion\na,b,c\n")))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        load(run(tmp_path / "twice.parquet"))


def test_another_delimiter_than_a_comma_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", '"prompt, long";completion\na,b;c\n')
    data = load(run(path, data_columns=("prompt=prompt, long",)))
    assert answers(data) == ["c"]
    assert data.notes == (f"{path}: its columns are taken apart at ;.",)


# Parquet and Arrow


def test_values_of_a_table_that_cannot_be_read_cost_their_row(tmp_path: Path) -> None:
    bad = (
        pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
        if False
        else pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).buffers())
    )
    pq.write_table(pa.table({"prompt": pa.array(["a", "b", "c"]), "completion": bad}), tmp_path / "rows.parquet")
    data = load(run(tmp_path / "rows.parquet", skip_bad_rows=True))
    assert answers(data) == ["good", "fine"]
    assert [(fault.row, fault.line, fault.reason) for fault in data.refused] == [
        (2, None, "a text of it is not UTF-8; write the file as UTF-8 again")
    ]


def test_chats_nest_in_a_table_and_empty_cells_are_missing(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "score": None}]
    path = written(tmp_path / "rows.parquet", parquet(rows))
    assert load(run(path)).rows[0].chat.turns == (Turn("user", "a"), Turn("assistant", "b"))
    numbers = pa.table({"prompt": ["a", "b"], "completion": pa.array([float("nan"), 2.5])})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    data = load(run(tmp_path / "numbers.parquet", skip_bad_rows=True))
    assert answers(data) == ["2.5"]
    assert "missing" in data.refused[0].reason


def test_an_arrow_file_whose_offsets_lie_is_refused_before_it_is_read(tmp_path: Path) -> None:
    honest = b"".join(value.to_bytes(4, "little") for value in (0, 2, 4))
    lying = b"".join(value.to_bytes(4, "little") for value in (0, 2, 2**30))
    for name in ("rows.arrow", "stream.arrow"):
        assert honest in KINDS[name]
        path = written(tmp_path / name, KINDS[name].replace(honest, lying))
        with pytest.raises(DataError, match="the Arrow file is damaged"):
            load(run(path))


# folders


def test_a_folder_gives_rows_to_train_and_rows_to_measure(tmp_path: Path) -> None:
    for name, rows in (("train", ROWS[:3]), ("valid", ROWS[3:4]), ("test", ROWS[4:])):
        written(tmp_path / "mlx" / f"{name}.jsonl", jsonl(rows))
    folder = tmp_path / "mlx"
    assert answers(load(run(folder))) == ["a0", "a1", "a2"]
    assert answers(load_eval(run(folder))) == ["a3"]
    assert load(run(folder)).notes == (
        f"{folder}: valid.jsonl is measured on, so nothing is held out of the rows to train.",
        f"{folder}: test.jsonl is not used.",
    )
    other = run(folder, eval_data=str(folder / "test.jsonl"))
    assert answers(load_eval(other)) == ["a4"]
    assert load(other).notes[0] == f"{folder}: valid.jsonl is not used, since eval_data names what is measured on."
    assert answers(load(run(f"{folder}:test"))) == ["a4"]
    assert load_eval(run(f"{folder}:train")) is None
    assert answers(load_eval(RunConfig(eval_data=str(folder)))) == ["a3"]


def test_names_of_data_mean_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "valid"):
        written(tmp_path / "set" / f"{name}.jsonl", TEXT)
    monkeypatch.chdir(tmp_path)
    assert absolute("set") == f"{tmp_path}/set"
    assert absolute("set:valid") == f"{tmp_path}/set:valid"
    assert [absolute(name) for name in ("owner/name:test", "builtin:python-docs", "", "gone.jsonl")] == [
        "owner/name:test",
        "builtin:python-docs",
        "",
        "gone.jsonl",
    ]
    assert (train_alone("set"), train_alone("set/train.jsonl")) == ("set:train", "set/train.jsonl")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"),
        ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/dev-00000-of-00001.parquet"),
        ("train/a.parquet", "train/b.parquet", "val/a.parquet"),
        ("Train_1.PARQUET", "Train_2.PARQUET", "eval.parquet"),
    ],
)
def test_shards_and_the_usual_folder_layouts_are_known(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, rows in zip(names, (ROWS[:2], ROWS[2:4], ROWS[4:]), strict=True):
        written(tmp_path / "set" / name, parquet(rows))
    written(tmp_path / "set" / "README.md", "not rows")
    assert answers(load(run(tmp_path / "set"))) == ["a0", "a1", "a2", "a3"]
    assert answers(load_eval(run(tmp_path / "set"))) == ["a4"]


def test_what_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": whole.select(range(3)), "validation": whole.select(range(3, 5))}).save_to_disk(str(tmp_path / "two"))
    assert answers(load(run(tmp_path / "one"))) == ["a0", "a1", "a2", "a3", "a4"]
    assert (answers(load(run(tmp_path / "two"))), answers(load_eval(run(tmp_path / "two")))) == (["a0", "a1", "a2"], ["a3", "a4"])


def test_a_folder_that_does_not_say_what_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without a train file; name a file of rows, or a folder that holds train.jsonl"):
        load(run(tmp_path))
    written(tmp_path / "chats.jsonl", TEXT)
    with pytest.raises(DataError, match=r"without a train file; name a file in it: chats.jsonl"):
        load(run(tmp_path))
    written(tmp_path / "train.jsonl", TEXT)
    with pytest.raises(DataError, match="there is no valid file in it"):
        load(run(f"{tmp_path}:valid"))
    with pytest.raises(DataError, match="neither a valid nor a test file"):
        load_eval(RunConfig(eval_data=str(tmp_path)))
    written(tmp_path / "train.csv", table(ROWS))
    with pytest.raises(DataError, match=r"its train rows are there twice: train.csv, train.jsonl; name the file that is meant"):
        load(run(tmp_path))


@pytest.mark.parametrize("other", ["train.jsonl.gz", "train-00001.jsonl", "training.jsonl", "train/a.jsonl"])
def test_rows_that_are_there_twice_are_not_trained_twice(tmp_path: Path, other: str) -> None:
    for name in ("train.jsonl", other):
        written(tmp_path / name, TEXT)
    with pytest.raises(DataError, match="its train rows are there twice"):
        load(run(tmp_path))


def test_a_fault_in_a_shard_names_the_shard(tmp_path: Path) -> None:
    written(tmp_path / "train-1.jsonl", jsonl(ROWS[:2]))
    second = written(tmp_path / "train-2.jsonl", jsonl(ROWS[2:3]) + "{\n")
    with pytest.raises(BadRow, match=f"^{second}, row 4, line 2: "):
        load(run(tmp_path))
    assert load(run(tmp_path, skip_bad_rows=True)).refused[0].source == str(second)


# dataset_info.json


def registry(folder: Path, entries: Mapping[str, object]) -> Path:
    return written(folder / "dataset_info.json", json.dumps(entries))


def test_a_registry_of_llama_factory_is_read_by_name(tmp_path: Path) -> None:
    written(tmp_path / "own.json", json.dumps([{"q": "a", "more": "b", "a": "c", "sys": "s", "output": "no"}]))
    written(tmp_path / "usual.jsonl", jsonl([{"instruction": "do", "input": "x", "output": "y", "system": "not named, so not read"}]))
    columns = {"prompt": "q", "query": "more", "response": "a", "system": "sys"}
    path = registry(
        tmp_path, {"own": {"file_name": "own.json", "columns": columns}, "usual": {"file_name": "usual.jsonl", "num_samples": 9}}
    )
    found = load(run(f"{tmp_path}:own"))
    assert found.format == "alpaca"
    assert [(turn.role, turn.content) for turn in found.rows[0].chat.turns] == [("system", "s"), ("user", "a\n\nb"), ("assistant", "c")]
    usual = load(run(f"{path}:usual"))
    assert [(turn.role, turn.content) for turn in usual.rows[0].chat.turns] == [("user", "do\n\nx"), ("assistant", "y")]
    assert "its num_samples is not followed" in usual.notes[0]


def test_tags_of_a_registry_say_who_speaks(tmp_path: Path) -> None:
    talk = [{"who": "USR", "what": "a"}, {"who": "BOT", "what": "b"}]
    written(tmp_path / "talk.jsonl", jsonl([{"dialogue": talk, "setting": "be kind", "conversations": "not this one"}]))
    written(tmp_path / "open.jsonl", jsonl([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "USR", "assistant_tag": "BOT"}
    registry(
        tmp_path,
        {
            "talk": {
                "file_name": "talk.jsonl",
                "formatting": "sharegpt",
                "columns": {"messages": "dialogue", "system": "setting"},
                "tags": tags,
            },
            "open": {"file_name": "open.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
        },
    )
    turns = load(run(f"{tmp_path}:talk")).rows[0].chat.turns
    assert [(turn.role, turn.content) for turn in turns] == [("system", "be kind"), ("user", "a"), ("assistant", "b")]
    assert [turn.content for turn in load(run(f"{tmp_path}:open")).rows[0].chat.turns] == ["a", "b"]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"file_name": "a.jsonl", "ranking": True}, "it holds preferences, which cannot be trained here"),
        ({"file_name": "a.jsonl", "columns": {"images": "pictures"}}, "it holds images, which cannot be trained here"),
        ({"file_name": "a.jsonl", "formatting": "odd"}, "its formatting 'odd' is not known"),
        ({"file_name": "a.jsonl", "columns": ["a"]}, "its columns are no names"),
        ({"script_url": "code.py"}, "it has neither file_name nor hf_hub_url"),
        ({"file_name": "gone.jsonl"}, "gone.jsonl: no such file"),
    ],
)
def test_an_entry_that_cannot_be_followed_is_refused(tmp_path: Path, entry: Mapping[str, object], fault: str) -> None:
    registry(tmp_path, {"one": entry})
    with pytest.raises(DataError, match=fault):
        load(run(tmp_path))


def test_a_registry_says_which_names_it_has(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", jsonl([{"instruction": "a", "response": "b"}]))
    path = registry(tmp_path, {"alpha": {"file_name": "a.jsonl"}, "beta": {"hf_hub_url": "owner/name"}})
    with pytest.raises(DataError, match=f"it names 2 datasets: alpha, beta; say which: {path}:alpha"):
        load(run(tmp_path))
    with pytest.raises(DataError, match="it names no dataset 'alpa'; did you mean alpha"):
        load(run(f"{tmp_path}:alpa"))
    with pytest.raises(BadRow, match=r"field output: there is no such column, and dataset_info.json names it"):
        load(run(f"{tmp_path}:alpha"))


# mixtures


def test_weights_are_reached_by_leaving_rows_out_and_never_by_repeating(tmp_path: Path) -> None:
    big = written(tmp_path / "big.jsonl", jsonl({"prompt": "big", "completion": f"b{n}"} for n in range(100)))
    small = written(tmp_path / "small.jsonl", jsonl({"prompt": "small", "completion": f"s{n}"} for n in range(10)))
    asked = RunConfig(data=(str(big), str(small)), data_weights=("3", "1"))
    data = load(asked)
    assert [source.rows for source in data.sources] == [30, 10]
    assert len(set(answers(data))) == len(data.rows) == 40
    assert [row.number for row in data.rows] == sorted(row.number for row in data.rows)
    assert data.notes == (
        f"data_weights: 30 of 100 rows of {big}, 10 of 10 rows of {small} are used, drawn by seed; no row is used twice.",
    )
    assert answers(load(asked)) == answers(data)
    written(big, "".join(reversed(big.read_text().splitlines(keepends=True))))
    assert sorted(answers(load(asked))) == sorted(answers(data)), "drawn by text, not by place"
    assert answers(load(RunConfig(data=asked.data, data_weights=asked.data_weights, seed=7))) != answers(data)


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        (("1", "2"), "2 weights for 1 sources"),
        (("0",), "'0' is no share"),
        (("-1",), "no share"),
        (("nan",), "no share"),
        (("x",), "no share"),
    ],
)
def test_weights_that_mean_nothing_are_refused(tmp_path: Path, weights: tuple[str, ...], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load(run(written(tmp_path / "rows.jsonl", TEXT), data_weights=weights))


@given(sources=st.lists(st.tuples(st.integers(0, 10_000), st.floats(0.001, 1000)), min_size=1, max_size=6))
def test_quotas_keep_the_shares_and_use_one_source_whole(sources: list[tuple[int, float]]) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    used = mixture.quotas(counts, weights)
    assert all(some <= whole and (some > 0) == (whole > 0) for some, whole in zip(used, counts, strict=True))
    assert not any(counts) or any(some == whole > 0 for some, whole in zip(used, counts, strict=True))
    scale = min((count / weight for count, weight in sources if count), default=0.0)
    assert all(abs(some - weight * scale) <= 1 for some, (whole, weight) in zip(used, sources, strict=True) if whole)


# rows on the disk


CHATS = [
    Chat((Turn("user", "a"), Turn("assistant", "b"))),
    Chat((Turn("user", "\ud800 \x00 ü", trained=False), Turn("assistant", "", tool_calls=({"type": "function", "x": [1, {"y": [2.5]}]},)))),
    Chat((), ids=((1, 2, 3), (0, 1, 1)), source_id="s"),
    Chat((Turn("tool", "t", name="n", tool_call_id="7"),), plain=True, tools=({"type": "function"},), joined=(3, 4)),
    Chat((Turn("assistant", "t"),), verbatim="text"),
]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "HELD_BYTES", 4000)


def test_rows_come_back_from_the_disk_as_they_were(on_disk: None, home: Path) -> None:
    rows = [Row(number, None if number % 3 else number, CHATS[number % len(CHATS)]) for number in range(1, 200)]
    pile = row_store.rows()
    for row in rows:
        pile.add(row)
    stored = pile.done()
    assert isinstance(stored, row_store.Stored)
    assert list(stored) == rows
    assert (stored[0], stored[-1], stored[57], len(stored)) == (rows[0], rows[-1], rows[57], 199)
    assert list(stored[10:50:7]) == rows[10:50:7]
    assert list(stored[::-1][3:5]) == rows[::-1][3:5]
    assert rows[100] in stored
    with pytest.raises(IndexError):
        stored[199]
    assert list((home / "cache").iterdir()) == [], "the file has no name, so it cannot be left behind"


def test_few_rows_stay_in_memory(home: Path) -> None:
    pile = row_store.rows()
    pile.add(Row(1, 1, CHATS[0]))
    assert pile.done() == (Row(1, 1, CHATS[0]),)
    assert not (home / "cache").exists()


def test_large_data_are_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "rows.jsonl", jsonl(ROWS * 20) + "{\n" * 30)
    other = written(tmp_path / "other.jsonl", jsonl({"prompt": "x", "completion": f"y{n}"} for n in range(50)))
    asked = RunConfig(data=(str(path), str(other)), skip_bad_rows=True, data_weights=("1", "1"))
    small = load(asked)
    monkeypatch.setattr(row_store, "HELD_BYTES", 4000)
    large = load(asked)
    assert isinstance(small.rows, tuple)
    assert not isinstance(large.rows, tuple)
    assert tuple(large.rows) == small.rows
    assert tuple(large.refused) == small.refused == tuple(Refusal(n, n, "", small.refused[0].reason, str(path)) for n in range(101, 131))


def test_the_disk_is_given_back_when_the_rows_are_dropped(on_disk: None) -> None:
    pile = row_store.rows()
    for number in range(100):
        pile.add(Row(number, None, CHATS[0]))
    stored = pile.done()
    held = set(Path("/proc/self/fd").iterdir())
    del pile, stored
    gc.collect()
    assert len(held - set(Path("/proc/self/fd").iterdir())) >= 1


def test_a_full_disk_is_told(on_disk: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", jsonl(ROWS * 40))
    monkeypatch.setattr(row_store, "_LOOK_EVERY_BYTES", 100)
    monkeypatch.setattr(row_store, "_FREE_BYTES", 2**62)
    with pytest.raises(SpaceError, match=r"too many to hold and only .* are free here; QLORA_TUI_HOME names another place"):
        load(run(path))
    (tmp_path / "home").mkdir(exist_ok=True)
    monkeypatch.setenv("QLORA_TUI_HOME", str(written(tmp_path / "a-file", "")))
    with pytest.raises(SpaceError, match="cannot be written here"):
        load(run(path))


# progress and stopping


def test_reading_tells_how_far_it_is_and_ends_at_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    files = [written(tmp_path / name, KINDS[name]) for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "rows.arrow", "rows.csv")]
    load(RunConfig(data=tuple(map(str, files))), progress=lambda done, total: told.append((done, total)))
    total = sum(file.stat().st_size for file in files)
    assert {whole for _, whole in told} == {total}
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "rows.jsonl.zst"])
def test_reading_stops_where_it_is_asked_to(tmp_path: Path, name: str) -> None:
    def stopping() -> None:
        raise Stopped("enough")

    path = written(tmp_path / name, KINDS[name])
    for read in (lambda: load(run(path), stopping=stopping), lambda: load_eval(RunConfig(eval_data=str(path)), stopping=stopping)):
        with pytest.raises(Stopped):
            read()


def test_a_small_file_that_unpacks_to_a_large_one_can_be_stopped(tmp_path: Path) -> None:
    path = written(tmp_path / "bomb.jsonl.gz", gzip.compress(b"\0" * 64 * 2**20))
    data = load(run(path, skip_bad_rows=True), lenient=True)
    assert [fault.reason[:32] for fault in data.refused] == ["the line is longer than 16 MiB; "]


# memory

_READER = """
import json, sys, time
from pathlib import Path
from qlora_tui.engine import data
from qlora_tui.engine.spec import RunConfig

def peak():
    # not ru_maxrss: a child begins with that of the process which started it
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before, began = peak(), time.monotonic()
found = data.load(RunConfig(data=(sys.argv[1],)))
seconds = time.monotonic() - began
count = sum(1 for _ in found.rows)
print(json.dumps({"rows": len(found.rows), "count": count, "middle": found.rows[len(found.rows) // 2].number, "peak": peak(),
                  "before": before, "seconds": seconds, "whole_seconds": time.monotonic() - began, "torch": "torch" in sys.modules}))
"""


def large_rows(path: Path, size: int) -> int:
    rows = 0
    with path.open("w") as file:
        while file.tell() < size:
            for _ in range(1000):
                row = {
                    "messages": [{"role": "user", "content": f"question {rows} " + "x" * 300}, {"role": "assistant", "content": "y" * 200}]
                }
                file.write(json.dumps(row) + "\n")
                rows += 1
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "rows.jsonl.gz"])
def test_two_hundred_megabytes_are_read_in_less_memory(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "rows.jsonl"
    rows = large_rows(source, 200 * 2**20)
    path = other_kind(source, tmp_path / kind)
    ran = subprocess.run(
        [sys.executable, "-c", _READER, str(path)], env=os.environ | {"PYTHONPATH": ".pkg"}, capture_output=True, text=True, check=True
    )
    found = json.loads(ran.stdout)
    print(kind, path.stat().st_size, found)
    assert (found["rows"], found["count"], found["middle"], found["torch"]) == (rows, rows, rows // 2 + 1, False)
    mapped = path.stat().st_size if kind == "rows.arrow" else 0  # pages of the file that are given back as soon as anybody needs them
    assert found["peak"] < 200 * 2**20 + mapped


def other_kind(source: Path, path: Path) -> Path:
    if path.name == "rows.json":
        path.write_text("[" + ",\n".join(source.read_text().splitlines()) + "]")
    elif path.name == "rows.jsonl.gz":
        path.write_bytes(gzip.compress(source.read_bytes(), 1))
    elif path.name != "rows.jsonl":
        whole = pa.Table.from_pylist([json.loads(line) for line in source.read_text().splitlines()])
        if path.suffix == ".parquet":
            pq.write_table(whole, path)  # one row group, as other tools write it
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
                writer.write_table(whole.combine_chunks())
    return path

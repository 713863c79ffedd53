"""Files of rows: every format, every kind of broken line, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import FORMATS, Chat, Turn, detect, load, load_eval, raw
from qlora_tui.engine.data.hub_rows import is_hub_name, read_hub
from qlora_tui.engine.errors import BadRow, DataError
from qlora_tui.engine.spec import RunConfig

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "messages": [
        GOOD,
        {"messages": [{"role": "User", "content": "a"}, {"role": " ASSISTANT ", "content": [{"type": "text", "text": "b"}]}]},
    ],
    "alpaca": [{"instruction": "a", "input": "", "output": "b"}, {"Instruction": "a", "output": 3}],
    "prompt-completion": [{"prompt": "a", "completion": " b"}, {"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}],
}


def run(path: Path | str, **changes: Any) -> RunConfig:
    return RunConfig(data=(str(path),), **changes)


def one(line: str, tmp_path: Path) -> str:
    """Return the sentence about the one line of a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(BadRow) as caught:
        load(run(path))
    assert caught.value.row == 1
    return str(caught.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_each_format_is_recognised_and_scores_best_on_its_own_rows(name: str) -> None:
    form, why = detect(SAMPLES[name])
    assert form.name == name
    assert "2 of the 2 rows looked at fit" in why
    assert all(form.score(rows) == 0 for other, rows in SAMPLES.items() if other != name)


def test_formats_are_known_to_the_table_of_keys() -> None:
    from qlora_tui.engine.spec import DATA_FORMATS

    assert {form.name for form in FORMATS} == set(DATA_FORMATS) - {"auto"}


def test_a_few_odd_rows_do_not_change_the_format() -> None:
    form, why = detect([GOOD, {"body": "a"}, {"messages": None}, GOOD])
    assert form.name == "messages"
    assert "2 of the 4 rows looked at fit" in why


def test_a_tie_is_said() -> None:
    form, why = detect([{**GOOD, "prompt": "a", "completion": "b"}])
    assert form.name == "messages"
    assert "prompt-completion would fit too" in why


def test_keys_are_compared_as_whole_words() -> None:
    with pytest.raises(DataError, match=r"'instructions', 'outputs'.*did you mean instruction\?"):
        detect([{"instructions": "a", "outputs": "b"}])


@pytest.mark.parametrize(
    ("name", "row", "chat"),
    [
        ("messages", SAMPLES["messages"][1], Chat((Turn("user", "a"), Turn("assistant", "b")))),
        (
            "messages",
            {"messages": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "x", "weight": 0}, *GOOD["messages"]]},
            Chat((Turn("user", "a"), Turn("assistant", "x", trained=False), Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            "alpaca",
            {"instruction": "do", "input": "this", "output": "done", "system": "be", "history": [["q", "r"]]},
            Chat((Turn("system", "be"), Turn("user", "q"), Turn("assistant", "r"), Turn("user", "do\n\nthis"), Turn("assistant", "done"))),
        ),
        ("alpaca", {"instruction": "do", "input": None, "output": "x"}, Chat((Turn("user", "do"), Turn("assistant", "x")))),
        ("prompt-completion", SAMPLES["prompt-completion"][0], Chat((Turn("user", "a"), Turn("assistant", " b")), plain=True)),
        (
            "prompt-completion",
            {"prompt": GOOD["messages"], "completion": [{"role": "assistant", "content": "c"}]},
            Chat((Turn("user", "a"), Turn("assistant", "b", trained=False), Turn("assistant", "c"))),
        ),
    ],
)
def test_rows_become_chats(name: str, row: Mapping[str, object], chat: Chat) -> None:
    form, _ = detect([row], name)
    assert form.read(row) == chat


@pytest.mark.parametrize(
    ("row", "field", "fault"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": None}, "messages", "list of messages"),
        ({"messages": "a"}, "messages", "list of messages"),
        ({"messages": ["a"]}, "messages[0]", "object with role and content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "messages[0].role", "'critic' is not known"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "messages[0].content", "found an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "only text"),
        ({"messages": GOOD["messages"][:1]}, "messages", "no assistant turn"),
        ({"messages": [*GOOD["messages"][:1], {"role": "assistant", "content": " "}]}, "messages[1].content", "empty"),
        (
            {"messages": [*GOOD["messages"][:1], {"role": "assistant", "tool_calls": [{}]}]},
            "messages[1].tool_calls[0]",
            "the call has no name",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "surrogate"),
        ({"messages": [*GOOD["messages"][:1], {"role": "assistant", "content": "a", "train": False}]}, "messages", "not to be trained"),
        ({**GOOD, "tools": [{}]}, "tools[0]", "the tool has no name"),
        ({"instruction": "a", "output": ""}, "output", "empty"),
        ({"instruction": "a", "output": None}, "output", "missing"),
        ({"instruction": " ", "output": "b"}, "instruction", "empty"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]", "pair"),
        ({"prompt": "a", "completion": True}, "completion", "found true or false"),
        ({"prompt": "a", "completion": GOOD["messages"]}, "completion[0].role", "begin with an assistant turn"),
    ],
)
def test_a_bad_row_names_its_field(row: Mapping[str, object], field: str, fault: str) -> None:
    form, _ = detect([row])
    with pytest.raises(BadRow, match=fault) as caught:
        form.read(row)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"messages": ', "line 1: the line is not JSON"),
        ("{'messages': 1}", "not JSON"),
        ("[" * 200_000, "nested too deeply|not JSON"),
        ("5", "must be an object"),
        ('"text"', "must be an object"),
    ],
)
def test_a_broken_line_is_named_with_what_to_do(tmp_path: Path, line: str, fault: str) -> None:
    import re

    if line.startswith("["):
        line = '{"a": ' + line
    message = one(line + "\n" + json.dumps(GOOD) + "\n", tmp_path)
    assert re.search(fault, message), message
    assert "rows.jsonl, row 1, line 1" in message
    assert "--skip-bad-rows goes on without it" in message


def test_skip_bad_rows_goes_on_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n  \r\n{\n" + b'{"messages": "\xff"}\n' + json.dumps(GOOD).encode())
    data = load(run(path, skip_bad_rows=True))
    assert [(row.number, row.line) for row in data.rows] == [(1, 1), (4, 6)]
    assert [(refusal.row, refusal.line) for refusal in data.refused] == [(2, 4), (3, 5)]
    assert "not UTF-8 (byte 15)" in data.refused[1].reason
    assert data.refused[0].source == str(path)
    with pytest.raises(BadRow, match="row 2, line 4"):
        load(run(path))


def test_a_field_at_fault_is_in_the_message(tmp_path: Path) -> None:
    message = one('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n', tmp_path)
    assert (
        message == f"{tmp_path}/rows.jsonl, row 1, line 1: field messages[1].content: the text is empty; --skip-bad-rows goes on without it"
    )


def test_a_line_that_is_too_long_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"messages": "' + b"x" * 3 * 2**20 + b'"}\n' + json.dumps(GOOD).encode() + b"\n")
    data = load(run(path, skip_bad_rows=True))
    assert [row.line for row in data.rows] == [2]
    assert "longer than 1 MiB" in data.refused[0].reason


def test_numbers_are_kept_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": 1.10}\n{"instruction": 1e3, "output": ' + "9" * 5000 + "}\n")
    rows = load(run(path)).rows
    assert rows[0].chat.turns[1].content == "1.10"
    assert rows[1].chat.turns[0].content == "1e3"
    assert "the text is missing" in one('{"instruction": "a", "output": NaN}', tmp_path)


def test_a_json_list_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, 5, GOOD], indent=1))
    data = load(run(path, skip_bad_rows=True))
    assert [(row.number, row.line) for row in data.rows] == [(1, 2), (3, 15)]
    path.write_text("[" + json.dumps(GOOD) + ",\n}")
    with pytest.raises(DataError, match=r"list is broken: .* at line 2"):
        load(run(path))


def test_sources_are_joined_and_numbered_over_all(tmp_path: Path) -> None:
    for name, rows in SAMPLES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(RunConfig(data=tuple(str(tmp_path / f"{name}.jsonl") for name in SAMPLES)))
    assert [row.number for row in data.rows] == [1, 2, 3, 4, 5, 6]
    assert [row.line for row in data.rows] == [1, 2] * 3
    assert data.format == "messages, alpaca, prompt-completion"
    assert [source.rows for source in data.sources] == [2, 2, 2]


def test_eval_data_is_read_on_its_own(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps(GOOD))
    found = load_eval(RunConfig(eval_data=str(tmp_path / "eval.jsonl")))
    assert found is not None
    assert len(found.rows) == 1
    assert load_eval(RunConfig()) is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("folder", "folder without a train file"),
        ("empty.jsonl", "there is no row in it"),
        ("odd.jsonl", "no known format fits: the rows hold the keys 'body'"),
        ("builtin:nothing", "no such data is built in"),
        ("x" * 5000, "no such file|cannot be a file name"),
        ("~nobody-here/rows.jsonl", "cannot be a file name"),
        ("rows\0.jsonl", "no such file|cannot be a file name"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "odd.jsonl").write_text('{"body": "a"}\n')
    for changes in ({}, {"skip_bad_rows": True}):
        with pytest.raises(DataError) as caught:
            load(run(name, **changes))
        assert any(part in str(caught.value) for part in fault.split("|"))


def test_all_rows_broken_is_an_error_even_when_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": []}\n' * 3)
    with pytest.raises(DataError, match="none of its 3 rows can be used; the first: row 1, field messages"):
        load(run(path, skip_bad_rows=True, data_format="messages"))
    report = load(run(path, data_format="messages"), lenient=True)
    assert (len(report.rows), len(report.refused)) == (0, 3)


def test_a_report_lists_rows_of_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}\n' * 2)
    report = load(run(tmp_path / "rows.jsonl"), lenient=True)
    assert [refusal.row for refusal in report.refused] == [1, 2]
    assert "no known format" in report.refused[0].reason


def test_foreign_names_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b]52;c;x\x07": 1}) + "\n")
    with pytest.raises(DataError) as caught:
        load(run(tmp_path / "rows.jsonl"))
    assert "\x1b" not in str(caught.value)


def test_hub_names_are_told_from_files() -> None:
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name:test")
    assert is_hub_name("owner/name@en.2024:train[:10%]+test")
    assert not any(is_hub_name(name) for name in ("data/rows.jsonl", "./owner/name", "/owner/name", "~/name", "rows", "a/b/c"))


def test_a_hub_dataset_that_is_not_here_is_something_to_correct_when_offline(home: Path) -> None:
    with pytest.raises(DataError, match="nobody/nothing: there is no such file, HF_HUB_OFFLINE is set"):
        load(run("nobody/nothing"))


def test_rows_of_a_hub_dataset_are_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"q{n}", "completion": n}) + "\n" for n in range(5))
    )
    monkeypatch.chdir(tmp_path)
    assert [raw.fields["completion"] for raw in read_hub("owner/name") if isinstance(raw.fields, dict)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="Unknown split"):
        list(read_hub("owner/name:nowhere"))
    assert capfd.readouterr() == ("", "")


def test_a_subset_and_a_part_of_a_split_of_a_hub_dataset_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for subset in ("en", "de"):
        (folder / f"{subset}.jsonl").write_text("".join(json.dumps({"text": f"{subset}{n}"}) + "\n" for n in range(4)))
    configs = "".join(f"- config_name: {subset}\n  data_files: {subset}.jsonl\n" for subset in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)

    def texts(name: str) -> list[object]:
        return [raw.fields["text"] for raw in read_hub(name) if isinstance(raw.fields, dict)]

    assert texts("owner/name@de") == ["de0", "de1", "de2", "de3"]
    assert texts("owner/name@en:train[:50%]") == ["en0", "en1"]


def test_the_builtin_rows_are_many_readable_and_always_the_same() -> None:
    data = load(RunConfig(data=("builtin:python-docs",)))
    again = load(RunConfig(data=("builtin:python-docs",)))
    assert 1_000 < len(data.rows) < 3_000
    assert data.rows == again.rows
    assert not data.refused
    texts = [turn.content for row in data.rows for turn in row.chat.turns]
    assert all(text.isprintable() and 10 < len(text) <= 700 for text in texts)
    assert any("json.dumps" in text for text in texts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.binary(max_size=40) | st.text(max_size=30).map(lambda text: json.dumps({"prompt": "a", "completion": text}).encode()), max_size=8
    )
)
def test_no_file_breaks_the_reader(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        data = load(run(path, skip_bad_rows=True, data_format="prompt-completion"), lenient=True)
    except DataError:
        return  # a file that begins with [ is one list, and it is broken
    whole = b"\n".join(lines).removeprefix(b"\xef\xbb\xbf")
    assert len(data.rows) + len(data.refused) == sum(bool(line.strip()) for line in whole.split(b"\n"))
    assert all(refusal.reason for refusal in data.refused)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5), escaped=st.booleans())
def test_texts_arrive_as_they_were_written(tmp_path: Path, texts: list[str], escaped: bool) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text, "completion": text}, ensure_ascii=escaped) + "\n" for text in texts),
        encoding="utf-8",
        newline="\n",
    )
    data = load(run(path))
    assert [row.chat.turns[1].content for row in data.rows] == texts

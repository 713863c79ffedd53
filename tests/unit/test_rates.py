"""Changes of the learning rate: how they are written, what cannot be one, and that each counts once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import report
from qlora_tui.engine.events import Command, Event, Record, Started, Stepped
from qlora_tui.engine.rates import HIGHEST, LOWEST, Change, Rates, planned, read
from qlora_tui.engine.resume import rate_changes
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import KEYS, RunConfig, values_of
from qlora_tui.engine.values import read_text
from qlora_tui.tui.screens.command import equivalent

RUN = RunConfig(model_name_or_path="a", data=("b",))
FACTORS = st.floats(LOWEST, HIGHEST)


@given(st.integers(1, 10**9), FACTORS)
def test_what_is_written_is_read_back_to_the_bit(step: int, factor: float) -> None:
    assert read(Change(step, factor, "").text) == Change(step, factor, "")


@given(st.lists(st.tuples(st.integers(1, 20), FACTORS), max_size=8))
def test_however_a_run_is_cut_up_each_change_counts_once_and_in_its_order(changes: list[tuple[int, float]]) -> None:
    texts = [Change(step, factor, "").text for step, factor in changes]

    def through(rates: Rates, first: int, last: int) -> list[float]:
        found = []
        for step in range(first, last + 1):
            for change in rates.due(step):
                rates.change(change)
            found.append(rates.factor)
        return found

    whole = through(Rates(planned(texts)), 1, 20)
    for cut in (1, 7, 19):
        part = Rates(planned(texts))
        begun = through(part, 1, cut)
        rest = Rates(planned(texts))
        rest.restore(json.loads(json.dumps(part.state())))
        assert begun + through(rest, cut + 1, 20) == whole


@pytest.mark.parametrize(
    "text", ["", "5", "0.5", ":0.5", "0:0.5", "-1:0.5", "5:0", "5:-1", "5:nan", "5:inf", "5:0.001", "5:101", "a:b", "5:0.5:2"]
)
def test_what_is_no_change_is_refused_with_how_one_looks(text: str) -> None:
    with pytest.raises(ValueError, match="^" + text.replace(".", r"\.") + "$"):
        read(text)
    (fault,) = problems(dataclasses.replace(RUN, learning_rate_changes=(text,)))
    assert fault.where == "learning_rate_changes"
    assert "STEP:FACTOR, such as 121:0.5" in fault.hint


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        (("9:0.1", "3:0.05"), {}, "at 9:0.1 it would be 0.005 times the planned one"),
        (("51:0.5",), {"max_steps": 50}, "51:0.5 comes after the last step, 50"),
        (("50:0.5", "3:0.05"), {"max_steps": 50}, ""),
    ],
)
def test_changes_that_lead_too_far_or_come_too_late_are_refused(changes: tuple[str, ...], more: dict[str, int], told: str) -> None:
    found = problems(dataclasses.replace(RUN, learning_rate_changes=changes, **more))
    assert [fault.message.split(";")[0] for fault in found] == ([told] if told else [])


def test_texts_with_commas_survive_the_command_line() -> None:
    prompts = ("what, now?", 'say "a"', "b")
    line = equivalent(dataclasses.replace(RUN, sample_prompts=prompts))
    import shlex

    value = next(word for word in shlex.split(line) if word.startswith("sample_prompts=")).removeprefix("sample_prompts=")
    assert read_text(KEYS["sample_prompts"], value) == prompts


def told(*events: Event) -> list[Record]:
    return [Record(1, number, float(number), event) for number, event in enumerate(events, 1)]


def changed(id: str, step: int | None, factor: object, *, obeyed: bool = True) -> Command:
    return Command(id, "set", obeyed, "", step, {"key": "learning_rate", "factor": factor})


def test_the_journal_tells_the_changes_once_each_and_nothing_that_was_refused_or_is_foreign() -> None:
    records = told(
        changed("a", 3, 0.5),
        changed("b", 4, 0.3, obeyed=False),
        Command("c", "pause", obeyed=True),
        changed("d", None, 0.5),
        changed("e", 5, "much"),
        Command("f", "set", True, "", 5, ["odd"]),  # type: ignore[arg-type]
        changed("a", 3, 0.5),
        changed("g", 9, 2.0),
    )
    assert [change.text for change in rate_changes(records)] == ["3:0.5", "9:2.0"]


def test_the_report_says_how_the_same_run_starts_without_keys(tmp_path: Path) -> None:
    config = values_of(dataclasses.replace(RUN, learning_rate_changes=("2:0.9",)))
    step = Stepped(9, 9, 1.0, 2.0, 1.0, False, False, 1e-4, 10, 5, 1.0, 0.0)
    text = report.write(tmp_path, told(Started("run", config, {}, {}), changed("a", 3, 0.5), changed("b", 7, 2.0), step)).read_text()
    assert """learning_rate_changes=["2:0.9", "3:0.5", "7:2.0"]'""" in text
    assert "changed 2 times on the way" in text
    value = text.split("learning_rate_changes=")[1].split("'")[0]
    assert read_text(KEYS["learning_rate_changes"], value) == ("2:0.9", "3:0.5", "7:2.0")
    plain = report.write(tmp_path, told(Started("run", config, {}, {}), step)).read_text()
    assert "on the way" not in plain

"""The report says the same twice, as Markdown and as one page that asks nobody for anything."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from canned_run import ending, middle, opening, step
from corpus import ATTACKS, FIRST, bad_characters, dressed, told
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import evaluate, judge, report
from qlora_tui.engine import events as ev
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.judge.kept import Call
from qlora_tui.engine.report import charts
from qlora_tui.engine.report.blocks import Bars, Curves, Line
from qlora_tui.engine.report.sections import all_sections, tone_of
from qlora_tui.engine.score import IMPROVEMENT_NATS, verdict
from qlora_tui.engine.spec import RunConfig

RUN = RunConfig(model_name_or_path="builtin:smollm2-135m", data=("builtin:python-docs",))
WORST = ({"row": 7, "base_loss": 1.0, "loss": 1.5, "prompt": "what is seven", "answer": "a number\nof days"},)


def seen_of(events: Sequence[ev.Event]) -> report.Seen:
    return report.see([ev.Record(1, number, 1.0 * number, event) for number, event in enumerate(events, 1)])


def whole_run() -> list[ev.Event]:
    score = ev.Evaluated(40, 2.1, 10, 0.1, "", 3.2, 1.1, (0.9, 1.3), 0.9, "a measurable improvement: good", WORST)
    probes = [ev.Probed(40, "general", "some passages", 23, 2000, 3.0, 3.3, -0.3, (-0.4, -0.2), 0.1)]
    found = ev.Finding("forgetting", "warn", 40, "general text is less likely", ("fewer epochs",))
    samples = [ev.Sampled(20, "say 3", "two"), ev.Sampled(40, "say 3", "three")]
    finished = ev.Finished("done", 0, "all 40 steps", adapter="adapter")
    return [*opening(RUN), *middle(40), *samples, score, *probes, found, ev.Saved(40, "adapter", 20 << 20, "adapter"), finished]


class Page(HTMLParser):
    """Every tag with its attributes, and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[tuple[str, tuple[str, ...]]] = set()
        self.values: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.values |= {value or "" for _, value in attrs}

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = Page(report.render_page(seen_of(whole_run()), tmp_path))
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "form", "base"} == set()
    assert {name for _, names in page.tags for name in names} & {"src", "onload", "onclick", "style", "background"} == set()
    links = {value for value in page.values if "/" in value or ":" in value} - {"default-src 'none'; style-src 'unsafe-inline'"}
    assert links == set()
    text = "".join(page.words)
    assert "url(" not in text
    assert "@import" not in text


def test_foreign_text_makes_no_tag_and_no_attribute(tmp_path: Path) -> None:
    """The page of a run whose every word is an attack has the tags of one whose words are harmless, and no other."""
    harmless = Page(report.render_page(seen_of([*told("harmless"), ev.Finished("failed", 1, "harmless", "harmless")]), tmp_path))
    for name in ("html", "bold", "link", "a line of its own", "unbalanced", "backslashes"):
        text = dressed(ATTACKS[name] + "\"><script>alert(1)</script><p onclick='x' class=\"")
        page = Page(report.render_page(seen_of([*told(text), ev.Finished("failed", 1, text, text)]), tmp_path))
        assert page.tags - {("br", ())} == harmless.tags, name
        assert "<script>alert(1)</script>" in "".join(page.words), name


def judged_and_exported(folder: Path, text: str) -> Path:
    """Keep answers, judgements and exports that hold `text` wherever it can stand."""
    folder.mkdir()
    judge.begin_answers(folder, judge.Sheet("digest", 2, 9, 1, text, 2))
    for row, tuned in enumerate((f"{text} tuned", f"{text} base")):
        answer = judge.Answered(row, text, text, f"{text} base", tuned)
        judge.keep_answer(folder, answer)
        judge.keep_judgement(folder, judge.Judgement(answer.pair, row, judge.ME, "tuned"))
        for first in ("base", "tuned"):
            judge.keep_judgement(folder, judge.Judgement(answer.pair, row, text, "tuned", Call(first, "tuned", 9, 9, 0.25)))
    parity = {"passed": False, "rows": 3, "data": text, "engine": text, "difference": 0.5, "worst": 1.5, "worst_row": text, "limit": 0.1}
    parity |= {"loss": 1.0, "adapter_loss": 1.0, "base_loss": 2.0, "quantized_loss": None, "prompts": 3, "prompt_tokens_differing": 1}
    parity |= {"stop": text, "faults": [text, text], "notes": [text]}
    record = {"target": text, "path": text, "type": text, "bytes": 1 << 30, "use": text, "parity": None}
    (folder / "exports.json").write_text(json.dumps([record, record | {"parity": parity}]))
    return folder


def test_what_is_told_of_judges_and_exports_makes_no_markup(tmp_path: Path) -> None:
    """Names of judges, paths, faults and stop words come from elsewhere, as all that a run did."""
    seen = seen_of(whole_run())
    folder = judged_and_exported(tmp_path / "harmless", "harmless")
    harmless, marks = Page(report.render_page(seen, folder)), re.compile(r"(?<!\\)[<>`*\[\]!]")
    plain = report.render(seen, folder)
    for words in ("by harmless", "you, blind", "It cost $1.00", "REFUSED", "fault: harmless", "nobody has compared it"):
        assert words in plain.replace("\\", ""), words
    for number, (name, attack) in enumerate(ATTACKS.items()):
        text = dressed(attack + "\"><script>alert(1)</script><p onclick='x' class=\"") if name != "very long" else dressed(attack)
        folder = judged_and_exported(tmp_path / str(number), text)
        page = report.render_page(seen, folder)
        assert Page(page).tags | {("br", ())} == harmless.tags, name
        markdown = report.render(seen, folder)
        assert bad_characters(markdown) | bad_characters(page) == set(), name
        assert [line for line in markdown.splitlines() if line.startswith("FORGED")] == [], name
        assert len(marks.findall(markdown)) == len(marks.findall(plain)), name
        assert FIRST in markdown, name


@pytest.mark.parametrize("odd", [{}, {"target": 5, "path": None}, {"target": "gguf", "path": "x", "type": "", "bytes": "much"}])
def test_an_odd_record_of_an_export_does_not_take_the_report_with_it(tmp_path: Path, odd: dict[str, Any]) -> None:
    folder = judged_and_exported(tmp_path / "run", "harmless")
    good = json.loads((folder / "exports.json").read_text())
    (folder / "exports.json").write_text(json.dumps([odd, *good]))
    text = report.render(seen_of(whole_run()), folder)
    assert "exports.json holds a record that this version cannot read" in text
    assert "fault: harmless" in text


def test_both_reports_have_the_same_sections(tmp_path: Path) -> None:
    seen = seen_of(whole_run())
    titles = [section.title for section in all_sections(seen, tmp_path)]
    text, page = report.render(seen, tmp_path), report.render_page(seen, tmp_path)
    assert titles == [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert all(f">{title}</h2>" in page for title in titles)
    expected = ["Did it help?", "Plan", "Training", "Data", "Memory", "Warnings", "Samples", "Use the adapter", "The same run again"]
    assert [title for title in expected if title not in titles] == []


@pytest.mark.parametrize("render", [report.render, report.render_page])
def test_a_report_holds_what_people_ask_for(render, tmp_path: Path) -> None:
    text = render(seen_of(whole_run()), tmp_path)
    for words in (
        "a measurable improvement",
        "what is seven",
        "of days",
        "row 7",
        "general text",
        "forgetting",
        "three",
        "two",
        "run.toml",
    ):
        assert words in text, words


@pytest.mark.parametrize("render", [report.render, report.render_page])
@pytest.mark.parametrize("manner", [False, True])
def test_a_report_says_whether_the_own_question_counts(render, tmp_path: Path, *, manner: bool) -> None:
    *events, finished = whole_run()
    score = next(event for event in events if isinstance(event, ev.Evaluated) and event.base_loss is not None)
    own = (0.03, (-0.09, 0.15)) if manner else (0.63, (0.34, 0.91))
    events.append(ev.Probed(40, "other_question", "answers of 24 rows", 24, 900, 5.0, 3.9, 1.1, (0.8, 1.4), 1.0, *own))
    if manner:
        events.append(ev.Finding("manner", "warn", 40, "perhaps only their manner was learned"))
        events.append(dataclasses.replace(score, verdict="no clear improvement beyond manner: so", manner=True))
    seen = seen_of([*events, finished])
    text = render(seen, tmp_path).replace("\\", "")
    assert "held-out answers after other questions" in text
    assert ("these answers gained 0.63 nats a token more" in text) is not manner
    assert ("a measurable improvement: good" in text) is not manner
    assert ("no clear improvement beyond manner: so" in text) is manner
    assert seen.scorecard is not None
    assert sum(item.step == 40 for item in seen.evaluations) == 1
    assert tone_of(seen.scorecard) == ("warn" if manner else "good")


def test_a_page_draws_the_curves_and_nothing_that_is_no_number(tmp_path: Path) -> None:
    page = report.render_page(seen_of([*opening(RUN), *middle(30), step(31, loss=math.inf)]), tmp_path)
    assert page.count("<svg") == 3
    assert "nan" not in page.lower().split("<body>")[1].split('<h2 id="data"')[0].replace("finance", "")
    assert "inf" not in "".join(part for part in page.split('points="')[1:])[:5000]


def test_rows_that_gained_and_lost_are_drawn_from_the_folder(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    evaluate.write_rows(tmp_path / "eval" / "base.jsonl", [RowLoss(1, 10.0, 5), RowLoss(2, 4.0, 4)])
    evaluate.write_rows(tmp_path / "eval" / "step-000040.jsonl", [RowLoss(1, 5.0, 5), RowLoss(2, 8.0, 4)])
    page = report.render_page(seen_of(whole_run()), tmp_path)
    assert (page.count('class="gain"'), page.count('class="loss"')) == (1, 1)
    (tmp_path / "eval" / "base.jsonl").write_text("{torn")
    assert 'class="gain"' not in report.render_page(seen_of(whole_run()), tmp_path)


def test_a_run_without_a_last_word_has_a_report(tmp_path: Path) -> None:
    for events in ([], opening(RUN), [*opening(RUN), *middle(3)]):
        seen = seen_of(events)
        assert "not finished" in report.render(seen, tmp_path)
        assert "not finished" in report.render_page(seen, tmp_path)


def test_a_resume_voids_what_came_after_it() -> None:
    seen = seen_of([*whole_run()[:-1], ev.Resumed(10), *ending()[1:]])
    assert seen.steps[-1].step == 10
    assert seen.samples == []
    assert seen.probes == {}


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.floats(0, 1e6), NUMBERS), max_size=40), st.lists(NUMBERS, max_size=40))
def test_any_figures_can_be_drawn(points: list[tuple[float, float]], values: list[float]) -> None:
    for drawn in (charts.curves(Curves("a", [Line("b", points), Line("c", points, "marks")])), charts.bars(Bars("d", values))):
        for word in ("nan", "inf"):
            assert word not in str(drawn).lower()


@given(st.floats(-5, 5), st.floats(0.001, 5))
def test_a_verdict_needs_the_size_and_the_interval(drop: float, reach: float) -> None:
    said = verdict(drop, (drop - reach, drop + reach))
    if drop - reach > 0:
        assert said.startswith("a measurable improvement" if drop >= IMPROVEMENT_NATS else "better, but by less than")
    else:
        assert said.startswith("worse than the base" if drop + reach < 0 else "no clear change")

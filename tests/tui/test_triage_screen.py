"""What the base already knows, in the wizard: seen before it is chosen, counted for every threshold, and never more than confirmed."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
from canned_run import QuietDesk
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.data.perplexity import USUAL, histogram, judge, most_of, perplexity, share_for
from qlora_tui.engine.errors import Stopped, WontFit
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.app import TunerApp
from qlora_tui.tui.scoring import Scored, scored_by
from qlora_tui.tui.screens.rows import title_of
from qlora_tui.tui.screens.triage import TriageScreen, scored_lines
from qlora_tui.tui.screens.wizard import WizardScreen
from qlora_tui.tui.writtenrows import WrittenRow

FOUND = tuple((1.05 + number / 40, number + 1) for number in range(70)) + tuple((50.0 * number, number) for number in range(71, 171))
SCORED = Scored(200, FOUND)
"""Seventy answers that the base knows, a hundred that it does not, and thirty that are too short."""


class ScoringDesk(QuietDesk):
    """A desk whose base has scored the answers in no time; with `waits` it goes on until it is stopped."""

    waits = False
    fault: Exception | None = None

    def score(self, run, say, stopping):
        say("scoring the answers", 3, 200)
        if self.waits:
            pause = threading.Event()
            while not stopping():
                pause.wait(0.01)
            raise Stopped("stopped")
        if self.fault:
            raise self.fault
        self._scored = {scored_by(run): SCORED}
        return SCORED

    def answers(self, run, rows):
        return {row: f"answer {row} \x1b[31m" for row in rows}


def words(app: TunerApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def wizard_of(app: TunerApp) -> WizardScreen:
    return next(screen for screen in app.screen_stack if isinstance(screen, WizardScreen))


def app_of(run: RunConfig, desk: ScoringDesk | None = None, **more) -> TunerApp:
    return TunerApp(start=None, draft=run, follow=None, desk=desk or ScoringDesk(), **more)


async def to_triage(pilot, until, app) -> None:
    for page in ("model", "data"):
        await pilot.press("enter")
        await until(pilot, lambda page=page: wizard_of(app).page.title == page)
    await until(pilot, lambda: "triage" in words(app))
    await pilot.press("f3")
    await until(pilot, lambda: isinstance(app.screen, TriageScreen))


async def test_it_is_off_until_chosen_and_explains_itself(run_config, until):
    app = app_of(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_triage(pilot, until, app)
        shown = " ".join(words(app).split())
        assert "○ off: nothing is left out" in shown
        assert "Under 3 is usual. At most 20 % of the rows go unless you allow more; answers under 16 tokens stay." in shown
        assert "dropped.jsonl beside the run" in shown
        assert "half as long as one epoch" in shown
        await pilot.press("s")
        await until(pilot, lambda: "answer 170" in words(app))
        shown = words(app)
        assert "it finds these absurd" in shown
        assert "the base knows these" in shown
        assert "◂ threshold" in shown
        assert "40 of 200 rows would go (20 %): perplexity under 3" in shown
        assert "70 are under 3, but at most 20 % of the rows go" in shown
        assert "30 answers under 16 tokens are not judged" in shown
        assert "lowest       1.05  row 1     answer 1 \\x1b[31m" in shown
        assert "highest     8,500  row 170   answer 170" in shown
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is wizard_of(app))
        assert wizard_of(app).run == run_config
        assert "triage    off; 70 answers are under 3 (F3)" in words(app)


async def test_switching_it_on_takes_the_rows_off_the_estimate(run_config, until):
    app = app_of(replace(run_config, max_length=512))
    async with app.run_test(size=(120, 36)) as pilot:
        await to_triage(pilot, until, app)
        await pilot.press("space")
        assert wizard_of(app).run.perplexity_filter == USUAL
        unseen = wizard_of(app).outlook
        assert [told for told in unseen.remarks if told.startswith("perplexity_filter will leave out rows (at most 20 %)")]
        await pilot.press("s")
        await until(pilot, lambda: "● on: under 3 is left out" in words(app) and "40 of 200 rows go" in words(app))
        seen = wizard_of(app).outlook
        assert seen.rows == 160 < unseen.rows
        assert seen.steps < unseen.steps
        assert not [told for told in seen.remarks if "perplexity_filter" in told]
        await pilot.press("left")
        assert wizard_of(app).run.perplexity_filter == 2.5
        await pilot.press("space", "right", "right")
        assert wizard_of(app).run.perplexity_filter == 0.0
        await until(pilot, lambda: "perplexity under 4" in words(app))
        await pilot.press("space")
        assert wizard_of(app).run.perplexity_filter == 4.0
        await pilot.press("escape")
        await until(pilot, lambda: "triage    40 of 200 answers go: the base knows them (under 4)" in words(app))


async def test_more_than_a_fifth_goes_only_once_it_is_confirmed(run_config, until):
    app = app_of(run_config)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_triage(pilot, until, app)
        assert "allow all" not in words(app)
        await pilot.press("s")
        await until(pilot, lambda: "a allow all" in words(app))
        assert "s score" not in words(app)
        await pilot.press("a", "space")
        assert wizard_of(app).run.perplexity_drop_most == 0.35
        await until(pilot, lambda: "70 of 200 rows go (35 %)" in words(app))
        assert "as you confirmed" in words(app)
        await pilot.press("a")
        assert wizard_of(app).run.perplexity_drop_most == 0.2


@pytest.mark.parametrize("key", ["s", "escape"])
async def test_the_scoring_ends_when_asked_and_with_the_screen(run_config, until, key):
    desk = ScoringDesk()
    desk.waits = True
    app = app_of(run_config, desk)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_triage(pilot, until, app)
        await pilot.press("s")
        await until(pilot, lambda: "scoring the answers: 3 of 200" in words(app))
        await pilot.press(key)
        if key == "s":
            await until(pilot, lambda: "the scoring was ended; s begins anew" in words(app))
        else:
            await until(pilot, lambda: app.screen is wizard_of(app))
        await until(pilot, lambda: not [thread for thread in app.workers if thread.group == "score" and thread.is_running])
    assert desk.scored(run_config) is None


async def test_what_is_wrong_is_told_in_a_sentence(run_config, until):
    desk = ScoringDesk()
    desk.fault = WontFit("the scoring of the answers does not fit: it needs 30 GiB\x1b[2J")
    app = app_of(run_config, desk)
    async with app.run_test(size=(80, 24)) as pilot:
        await to_triage(pilot, until, app)
        await pilot.press("s")
        await until(pilot, lambda: "does not fit: it needs 30 GiB\\x1b[2J" in words(app))
        desk.fault = None
        await pilot.press("s")
        await until(pilot, lambda: "it finds these absurd" in words(app))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 50)])
async def test_in_ascii_every_cell_is_ascii(run_config, until, size):
    app = app_of(run_config, ascii_only=True)
    async with app.run_test(size=size) as pilot:
        await to_triage(pilot, until, app)
        await pilot.press("s")
        await until(pilot, lambda: "threshold" in words(app) and "row" in words(app))
        assert words(app).isascii()


def test_where_every_answer_is_short_nothing_is_judged(run_config):
    told = "\n".join(line.plain for line in scored_lines(Scored(5), run_config, 3.0, 76, {}))
    assert "0 of 5 rows would go (0 %)" in told
    assert "5 answers under 16 tokens are not judged" in told


def test_a_row_says_how_well_the_base_knows_it(run_config):
    row = WrittenRow(7, tokens=40, trained=20)
    title = title_of(row, 6, 40, replace(run_config, perplexity_filter=3.0), 80, 1.234)
    assert title.plain.startswith("row 7 · 40 tokens · 50 % trained · perplexity 1.23")
    assert "perplexity" not in title_of(row, 6, 40, run_config, 80).plain


async def test_other_rows_or_another_base_have_to_be_scored_anew(run_config):
    desk = ScoringDesk()
    desk.score(run_config, lambda *told: None, lambda: False)
    for same in ({"perplexity_filter": 5.0, "perplexity_drop_most": 0.9}, {"learning_rate": 1e-5}, {"skip_bad_rows": True}):
        assert desk.scored(replace(run_config, **same)) is SCORED
    for other in ({"data": ("other.jsonl",)}, {"model_name_or_path": "m"}, {"max_length": 99}, {"seed": 1}, {"val_set_size": 0.0}):
        assert desk.scored(replace(run_config, **other)) is None


@given(st.lists(st.floats(min_value=0.0, max_value=12.0), min_size=1, max_size=60), st.integers(min_value=0, max_value=20))
def test_the_screen_counts_what_the_run_leaves_out(means: list[float], short: int):
    rows = len(means) + short
    scored = Scored(rows, tuple(sorted((perplexity(mean), row) for row, mean in enumerate(means))))
    for threshold, most in ((3.0, 0.2), (30.0, 0.5), (1.5, 1.0)):
        run = RunConfig(perplexity_filter=threshold, perplexity_drop_most=most)
        assert scored.gone(run) == len(judge(run, rows, range(len(means)), means).left_out)
        under = scored.under(threshold)
        assert most_of(replace(run, perplexity_drop_most=share_for(under, rows)), rows) >= under


@given(st.lists(st.floats(min_value=1.0, max_value=1e6), max_size=60), st.floats(min_value=1.01, max_value=99.0))
def test_every_answer_is_in_one_bin_and_one_begins_at_the_threshold(values: list[float], threshold: float):
    bins = histogram(values, threshold)
    assert sum(rows for _, _, rows in bins) == len(values)
    assert all(low < high for low, high, _ in bins)
    assert bins[-1][1] == math.inf
    assert sum(rows for _, high, rows in bins if high <= threshold) == sum(value < threshold for value in values)

"""The table of the room's README, in short: every illness is named in time and no healthy run is stopped."""

from __future__ import annotations

import pytest
import table
from make_traces import RECIPES
from synthetic import HEALTHY, ILL, ONSET, ONSETS

SEEDS = range(1000, 1003)  # others than those of the published table


@pytest.mark.parametrize("name", HEALTHY)
def test_no_healthy_run_is_stopped(name: str) -> None:
    for seed in SEEDS:
        assert table.runs_of(HEALTHY[name](seed)).stops(["spike", "non_finite"]) == []


@pytest.mark.parametrize("name", ILL)
def test_every_illness_is_named_in_time(name: str) -> None:
    make, names, within = ILL[name]
    delays = [table.runs_of(make(seed)).named(names, ONSETS.get(name, ONSET)) for seed in SEEDS]
    assert all(delay is not None and delay <= within for delay in delays), delays


@pytest.mark.parametrize("name", table.RECORDED)
def test_recorded_runs_are_judged_as_published(name: str) -> None:
    batch, names, onset, within = table.RECORDED[name]
    outcome = table.judge(table.recorded(name), batch, warmup=20)
    if not names:
        assert outcome.stops(["spike", "non_finite"]) == []
        return
    delay = outcome.named(names, onset)
    assert delay is not None
    assert delay <= within


def test_every_trace_can_be_made_again_and_is_told_of() -> None:
    files = {path.stem for path in (table.HERE / "traces").glob("*.csv")}
    assert files == set(RECIPES) == {name.removesuffix(table.ALONE) for name in table.RECORDED}


def test_the_published_table_is_that_of_these_runs() -> None:
    text = table.README.read_text(encoding="utf-8").split(table.BEGIN)[1].split(table.END)[0]
    assert [name for name in (*HEALTHY, *ILL, *table.RECORDED) if f"| {name} |" not in text] == []
    assert "200 seeds" in text

from __future__ import annotations

import json

import pytest
from canned_run import step

from qlora_tui.engine import prices, report
from qlora_tui.engine.events import Device, Phase, Prepared, Record, Started, encode
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.report import cost
from qlora_tui.engine.spec import RunConfig, values_of

RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "kind": "cuda", "total_bytes": 24_564 << 20}
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"


def journal(folder, *told, device=RTX_4090, model=LLAMA):
    """Write the events of `told`, pairs of attempt and moment first, after the beginning of a run at moment 0."""
    opening = Started("a-run", values_of(RunConfig(model_name_or_path=model)), {}, device)
    events = [(1, 0.0, opening), *told]
    lines = [encode(Record(attempt, number, moment, event)) for number, (attempt, moment, event) in enumerate(events, 1)]
    folder.mkdir(exist_ok=True)
    (folder / EVENTS).write_text("".join(f"{line}\n" for line in lines))
    return folder


def told(folder):
    """Return the section's lines, from one reading of the journal."""
    return cost.lines(report.see(read_records(folder / EVENTS)))


def steps(number, hours=2.0):
    return [(1, hours * 3600 * at / number, step(at, number, rows=(1, 2, 3), tokens=3000)) for at in range(1, number + 1)]


def watts(*values):
    return [(1, 1.0, Device(power_watts=value)) for value in values]


def test_hours_are_those_of_all_attempts_and_watts_those_that_were_measured(tmp_path):
    later = [(2, 90_000.0, Phase("load", "begin")), (2, 93_600.0, Phase("load", "end"))]
    lines = " ".join(told(journal(tmp_path / "run", *watts(300.0, 340.0), *steps(50), *later)))
    assert "for 3 h" in lines
    assert "320 W (measured in this run)" in lines
    assert "0.42" not in lines
    assert "1.26 kWh" in lines  # (320 + 100) W x 3 h


def test_the_same_steps_are_reckoned_on_the_rented_card(tmp_path):
    prepared = [(1, 1.0, Prepared("messages", "", 160, 150, 10, 450_000, 1, 50, 50))]
    lines = " ".join(told(journal(tmp_path / "run", *prepared, *steps(50))))
    assert "A100 80GB" in lines
    assert "Break-even: the card ($1,600)" in lines


def test_a_model_nobody_knows_has_no_rented_hours_and_a_processor_no_card(tmp_path):
    cpu = {"name": "a processor", "kind": "cpu", "total_bytes": 8 << 30}
    lines = " ".join(told(journal(tmp_path / "run", *steps(5), device=cpu, model="nobody/knows-it")))
    assert "not reckoned" in lines
    assert "65 W (assumed for a processor)" in lines
    assert "share" not in lines


def test_without_a_beginning_there_is_no_section(tmp_path):
    assert "## Cost" not in report.render(report.see([]), tmp_path)


def test_own_prices_count_and_broken_ones_are_told(tmp_path):
    folder = journal(tmp_path / "run", *steps(5))
    prices.save({"electricity": "1", "watts": "400", "rest_watts": "0", "currency": "€"})
    assert "€0.80" in " ".join(told(folder))
    prices.path().write_text("electricity = 'much'")
    assert "prices.toml" in " ".join(told(folder))


@pytest.mark.parametrize("damage", [{"name": 5, "kind": [], "total_bytes": "much"}, {}])
def test_a_journal_of_another_version_does_not_break_the_report(tmp_path, damage):
    folder = journal(tmp_path / "run", *steps(5), device=damage)
    assert "## Cost" in report.render(report.see(read_records(folder / EVENTS)), folder)


def test_foreign_words_of_the_price_file_reach_no_viewer_as_markup(tmp_path):
    folder = journal(tmp_path / "run", *steps(5))
    prices.path().parent.mkdir(parents=True)
    prices.path().write_text(f"currency = {json.dumps('<b>')}\n")
    assert "<b>" not in report.render(report.see(read_records(folder / EVENTS)), folder)

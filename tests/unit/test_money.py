from __future__ import annotations

import dataclasses
import doctest
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import cards, machine, models, money, prices, timetable, until
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.forecast import Work, before_work
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.cli import main

LLAMA = models.find("meta-llama/Llama-3.1-8B-Instruct")
RTX_4090 = machine.find_card("RTX 4090")
STRANGER = machine.Machine("NVIDIA GB999", "cuda", 80 << 30, bf16=True)
TWO_CORES = machine.Machine("cpu", "cpu", 8 << 30, cores=2)
WORK = Work(10**7, 625, 625, 10**5, (1000,) * 50, 10_000, 100)


def known(**changes):
    return prices.save({name: str(text) for name, text in changes.items()}) if changes else prices.read()


def test_the_sum_of_the_article_s_figures():
    found = money.bill(
        known(electricity="0.20", rest_watts="50", card_hours="8000", setup_hours="1"), RTX_4090, (10, 10), rented_hours=(5, 5)
    )
    assert found.electricity == pytest.approx((10 * 0.5 * 0.20,) * 2)  # 450 + 50 W
    assert found.share == pytest.approx((10 * 1600 / 8000,) * 2)
    assert found.here == pytest.approx((3.0, 3.0))
    assert found.rented.cost == pytest.approx((6 * 3.0, 6 * 5.0))
    assert found.break_even == pytest.approx((1600 / 29, 1600 / 17))


def test_measured_watts_win_over_the_maker_s_and_a_person_s_over_both():
    assert money.bill(known(), RTX_4090, (1, 1), watts=312.0).power.device == (312.0, 312.0)
    assert "measured" in money.bill(known(), RTX_4090, (1, 1), watts=312.0).power.how
    assert money.bill(known(watts="280"), RTX_4090, (1, 1), watts=312.0).power.device == (280.0, 280.0)


def test_an_estimate_is_called_one_and_every_price_says_where_it_was_read():
    assert money.bill(known(), RTX_4090, (1, 1)).power.how == "what it is said to take at most"
    assert "an estimate" in money.bill(known(), machine.find_card("RTX 4070"), (1, 1)).power.how
    assert "its launch price: estimate" in " ".join(money.lines(money.bill(known(), machine.find_card("RTX 4080"), (1, 1))))
    assert all(row["source"] for name, row in prices.table().items() if name not in ("currency", "rent_card"))
    assert all(price[1] for price in map(prices.launch_price, [card.name for card in cards.cards()]) if price)


def test_what_is_not_known_is_said_and_not_made_up():
    stranger = money.bill(known(), STRANGER, (1, 2))
    assert stranger.power is None
    assert stranger.here is None
    assert stranger.break_even is None
    assert "money watts=" in " ".join(money.lines(stranger))
    h100 = money.bill(known(), machine.find_card("H100 80GB"), (1, 1), rented_hours=(1, 1))
    assert h100.share is None
    assert h100.break_even is None
    assert "price is not known" in " ".join(money.lines(h100))
    assert json.dumps(stranger.to_json(), allow_nan=False)


def test_a_processor_has_no_card_to_pay_for():
    found = money.bill(known(), TWO_CORES, (1, 1), rented_hours=(0.1, 0.1))
    assert found.share is None
    assert found.break_even is None
    assert found.power.all == (165.0, 165.0)
    assert "price is not known" not in " ".join(money.lines(found))


def test_a_bill_in_one_line_says_here_and_rented_first():
    """So much of it a terminal of 80 columns shows on its first line."""
    told = money.short(money.bill(known(), RTX_4090, (10, 31), rented_hours=(5, 19)))
    first, paid, assumed = told.split("; ")
    assert first == "$2.54 - 9.90 here / $16.50 - 97.50 rented (A100 80GB)"
    assert len(first) <= 62
    assert paid.startswith("the card is paid for after")
    assert assumed == "here: 450 W and 100 W of the rest, $0.17 - 0.29 a kWh, the card's share"


def test_renting_that_costs_less_than_the_electricity_never_pays_for_a_card():
    found = money.bill(known(rent="0.01", setup_hours="0"), RTX_4090, (10, 10), rented_hours=(1, 1))
    assert found.break_even == (math.inf, math.inf)
    assert "never" in " ".join(money.lines(found))
    assert found.to_json()["break_even_runs"] == [None, None]


positive = st.floats(0.01, 1e4)
ranges = st.tuples(positive, positive).map(lambda pair: (min(pair), max(pair)))


@given(hours=ranges, rented=ranges, electricity=ranges, rent=ranges)
def test_every_range_has_its_ends_in_order_and_more_hours_cost_more(hours, rented, electricity, rent):
    base, _ = prices.usable()
    found = dataclasses.replace(base, electricity=electricity, rent=rent)
    one = money.bill(found, RTX_4090, hours, rented_hours=rented)
    two = money.bill(found, RTX_4090, (2 * hours[0], 2 * hours[1]), rented_hours=rented)
    for part in (one.electricity, one.share, one.here, one.rented.cost, one.break_even):
        assert 0 <= part[0] <= part[1]
    assert two.here == pytest.approx((2 * one.here[0], 2 * one.here[1]))
    assert all(line.endswith(".") for line in money.lines(one))


def test_a_run_is_reckoned_on_the_rented_card_by_its_own_plan():
    run = RunConfig(max_length=1024)
    time = before_work(LLAMA, run, RTX_4090, WORK)
    found = money.before_run(LLAMA, run, RTX_4090, time, WORK)
    assert found.rented.card == "A100 80GB"
    assert found.rented.hours[1] < found.hours[1]
    known(rent_card="H100 80GB")
    assert money.before_run(LLAMA, run, RTX_4090, time, WORK).rented.hours[1] < found.rented.hours[1]
    known(rent_card="RTX 3060")
    huge = models.find("Qwen/Qwen2.5-14B-Instruct")
    assert money.before_run(huge, RunConfig(method="lora"), RTX_4090, time, WORK).rented is None
    assert money.before_run(LLAMA, run, RTX_4090, None, WORK) is None


ROWS = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "word " * 1000}]}


def budget(capsys, write_jsonl, rows, *more):
    data = write_jsonl([ROWS] * rows)
    assert (
        main(["budget", "--model", LLAMA.name, "--card", "RTX 3060", "--data", str(data), "--set", "gradient_checkpointing=true", *more])
        == 0
    )
    return capsys.readouterr().out


def test_a_budget_says_what_the_run_costs(home, capsys, write_jsonl):
    document = json.loads(budget(capsys, write_jsonl, 50, "--json"))
    assert document["cost"]["currency"] == "$"
    assert document["cost"]["here"][0] < document["cost"]["here"][1]
    assert document["cost"]["rented_hours"][1] * 3600 < document["time"]["total_seconds"][2]
    assert document["shorter"] == []
    lines = budget(capsys, write_jsonl, 50).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("cost    Here: $"))
    assert [line.split(":")[0].strip() for line in lines[at + 1 : at + 4]] == ["Rented", "Break-even", "Assumed"]


def test_a_budget_over_12_hours_says_what_makes_the_run_shorter(home, capsys, write_jsonl):
    shown = budget(capsys, write_jsonl, 6000, "--set", "num_train_epochs=3")
    assert "is over 12 h" in shown
    assert "shorter --set num_train_epochs=" in shown
    assert "--set max_samples=" in shown and "--set lora_r=8 --set lora_alpha=16" in shown  # noqa: PT018


def test_a_budget_says_how_many_steps_fit_before_a_time_of_day(home, capsys, write_jsonl, monkeypatch):
    monkeypatch.setattr(until, "moment", lambda text, now: now + 3600)
    shown = budget(capsys, write_jsonl, 6000, "--until", "07:00")
    assert "Until 07:00 there is 1 h" in shown or "Until 07:00 there is 60 min" in shown
    assert "steps fit, and the run takes as many" in shown


@pytest.mark.parametrize("module", [money, timetable], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


# prices


def test_every_card_has_its_power_and_every_default_its_type(home):
    assert all(card.power_watts > 0 for card in cards.cards())
    found = prices.read()
    assert found.own == ()
    assert found.rent == (3.0, 5.0)
    assert prices.launch_price("RTX 4090")[0] == 1600
    assert all(cards.find(name) for name in json.loads((Path(prices.__file__).parent / "prices.json").read_text())["cards"])


def test_own_prices_are_kept_and_go_back(home):
    assert prices.save({"electricity": "0.31", "rent": "2-3", "currency": "€", "rent_card": "4090"}).own == (
        "electricity",
        "rent",
        "currency",
        "rent_card",
    )
    found = prices.read()
    assert (found.electricity, found.rent, found.currency, found.rent_card) == ((0.31, 0.31), (2.0, 3.0), "€", "RTX 4090")
    assert prices.save({"electricity": "", "rent": ""}).own == ("currency", "rent_card")
    assert prices.read().rent == (3.0, 5.0)


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("electricty", "0.3", "did you mean electricity?"),
        ("rent", "cheap", "a range"),
        ("rent", "5-3", "a range"),
        ("rent", "-3", "a range"),
        ("rent", "nan", "a range"),
        ("rent", "1-2-3", "a range"),
        ("rent", "1e300", "a range"),
        ("card_hours", "0", "above 0"),
        ("currency", "a sign far too long", "€"),
        ("currency", "\x1b[", "€"),
        ("rent_card", "GB999", "known"),
    ],
)
def test_bad_prices_are_one_sentence_and_nothing_is_kept(home, name, text, hint):
    with pytest.raises(ConfigError) as error:
        prices.save({"electricity": "0.31", name: text})
    assert hint in str(error.value)
    assert not prices.path().exists()


@pytest.mark.parametrize("text", ["rent = [", "rnet = 3\n", "rent = true\n", "rent = [1, 2, 3]\n", "rent = '3'\n", "\x00"])
def test_a_file_that_was_edited_badly_is_named_and_stands_in_nobody_s_way(home, text):
    prices.path().parent.mkdir(parents=True)
    prices.path().write_text(text)
    with pytest.raises(ConfigError) as error:
        prices.read()
    assert "prices.toml" in str(error.value)
    found, fault = prices.usable()
    assert found.rent == (3.0, 5.0)
    assert "prices.toml" in fault


# the command


def test_the_command_shows_every_price_with_its_source(home, capsys):
    assert main(["money"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in prices.table())
    assert "Eurostat" in shown
    assert "the article" in shown


def test_the_command_keeps_prices_and_prints_them_as_json(home, capsys):
    assert main(["money", "electricity=0.31", "rent=2-3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prices"]["rent"]["value"] == [2.0, 3.0]
    assert document["prices"]["rent"]["yours"]
    assert not document["prices"]["watts"]["yours"]
    assert main(["money", "rent"]) == 2
    assert main(["money", "rnet=3"]) == 2
    assert "did you mean rent?" in capsys.readouterr().err

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine import spec, text, units


@pytest.mark.parametrize("module", [units, spec, text], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


@given(st.floats(0, 1e8))
def test_words_never_show_a_full_unit_as_many_small_ones(seconds):
    said = units.words(seconds)
    assert "60 min" not in said
    assert "24 h" not in said
    assert "-" not in said


@given(st.floats(120, 1e7))
def test_words_are_within_a_minute_or_three_percent(seconds):
    sizes = {"s": 1, "min": 60, "h": 3600, "d": 86400}
    parts = units.words(seconds).split()
    total = sum(float(number) * sizes[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(total - seconds) <= max(30.5, 0.03 * seconds)


@given(st.integers(-(2**50), 2**50))
def test_gib_keeps_sign_and_never_says_more_than_1024_mib(size):
    said = units.gib(size)
    number, unit = said.split()
    assert said.startswith("-") == (size < 0)
    assert unit in ("GiB", "MiB", "KiB")
    assert unit == "GiB" or abs(float(number)) <= 1024


@given(st.integers(-(10**15), 10**15))
def test_count_round_trips(number):
    assert int(units.count(number).replace(",", "")) == number


def test_gib_says_zero_plainly():
    assert units.gib(0) == "0 KiB"

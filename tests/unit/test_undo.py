"""Changes taken back: in their order, what is typed at a stretch as one, and nothing of other pages with them."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.screens.undo import MOST, Undo

changes = st.one_of(
    st.builds(lambda value: {"lora_r": value}, st.integers(1, 64)),
    st.builds(lambda value: {"max_length": value, "seed": value}, st.integers(16, 64)),
    st.builds(lambda value: {"learning_rate": value}, st.floats(0, 1)),
)


@given(st.lists(changes, max_size=30))
def test_taking_everything_back_gives_the_first_run(made):
    undo, first = Undo(), RunConfig()
    run = first
    for change in made:
        after = dataclasses.replace(run, **change)
        undo.note(run, after)
        run = after
    while undo:
        run = undo.back(run)
    assert run == first
    assert undo.back(run) == first


def test_what_is_typed_at_a_stretch_is_taken_back_as_one():
    undo = Undo()
    runs = [RunConfig(max_length=length) for length in (2048, 40, 400, 4000)]
    for before, after in itertools.pairwise(runs):
        undo.note(before, after, "max_length 1")
    undo.note(runs[-1], RunConfig(max_length=64), "max_length 2")
    assert undo.back(RunConfig(max_length=64)).max_length == 4000
    assert undo.back(runs[-1]).max_length == 2048


def test_what_was_chosen_elsewhere_meanwhile_stays():
    undo, run = Undo(), RunConfig()
    undo.note(run, dataclasses.replace(run, lora_r=32))
    assert undo.back(RunConfig(lora_r=32, model_name_or_path="a/b")) == RunConfig(model_name_or_path="a/b")


def test_only_so_many_are_remembered():
    undo = Undo()
    for seed in range(MOST + 20):
        undo.note(RunConfig(seed=seed), RunConfig(seed=seed + 1))
    assert len(undo) == MOST

"""Row lengths: measured where the tokenizer lies on this disk, else a guess that says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui.datalook import DataLook
from qlora_tui.tui.lengths import Lengths, share, used_rows
from qlora_tui.tui.screens.desk import Desk
from qlora_tui.tui.screens.effects import Scene, note_of
from qlora_tui.tui.screens.settings import MAIN

LENGTH = next(setting for setting in MAIN if setting.name == "max_length")


@pytest.fixture
def run(tiny_model, chat_rows, write_jsonl) -> RunConfig:
    return RunConfig(model_name_or_path=str(tiny_model), data=(str(write_jsonl(chat_rows)),))


def test_a_tokenizer_on_this_disk_counts_the_rows(run):
    desk = Desk()
    look = desk.look_at_data(run)
    assert not look.lengths.measured
    found = desk.measure(run, look)
    assert found is not None
    assert found.lengths.measured
    assert len(found.lengths.tokens) == look.rows
    assert found.tokens == sum(found.lengths.tokens)


def test_without_a_tokenizer_the_guess_stays(run, tmp_path):
    desk = Desk()
    look = desk.look_at_data(run)
    assert desk.measure(replace(run, model_name_or_path="nobody/nothing"), look) == replace(look, repeated=())
    empty = desk.measure(replace(run, model_name_or_path=str(tmp_path)), look)
    assert replace(empty.lengths, notes=()) == look.lengths
    assert "tokenizer" in empty.lengths.notes[0]


def test_rows_that_are_token_ids_are_counted_without_a_tokenizer(run, write_jsonl):
    rows = [{"input_ids": [1] * n, "labels": [-100] * 2 + [1] * (n - 2)} for n in (3, 9, 5)]
    named = replace(run, model_name_or_path="nobody/nothing", data=(str(write_jsonl(rows, "ids.jsonl")),), data_format="tokenized")
    lengths = Desk().look_at_data(named).lengths
    assert (lengths.tokens, lengths.first, lengths.trained) == ((3, 5, 9), (2, 2, 2), 11)
    assert lengths.measured
    assert lengths.whole


def test_rows_that_are_cut_or_split_are_counted_and_those_that_are_dropped_are_not(run):
    lengths = Lengths((10, 20, 30, 4000), measured=True, whole=True, refused=((5, "why"),))
    kept, cut = (used_rows(replace(run, max_length=100, too_long=way), lengths, 100) for way in ("drop", "cut"))
    assert sum(kept) == 60  # of five one cannot be written out, and one is too long
    assert sum(cut) == 80
    assert lengths.fitted(replace(run, max_length=100, too_long="cut")).longest_trained(100) == 100
    assert lengths.longest_trained(100) == 30
    assert sum(used_rows(replace(run, max_length=4096, filter_duplicates="exact"), lengths, 100, copies=7)) == 73


def test_a_turn_that_is_read_and_not_written_out_shows(run, write_jsonl):
    rows = [{"prompt": f"say {n}", "completion": "yes" if n else "a <|im_end|> b"} for n in range(9)]
    named = replace(run, data=(str(write_jsonl(rows, "turns.jsonl")),))
    desk = Desk()
    look = desk.look_at_data(named)
    assert look.lengths.turns == (("user", 9, -1), ("assistant", 9, -1))
    assert desk.measure(named, look).lengths.turns == (("user", 9, 8), ("assistant", 9, 8))


def scene(run: RunConfig, lengths: Lengths) -> Scene:
    return Scene(run, look=DataLook(run.data, lengths=lengths))


def test_rows_over_the_limit_are_told_and_not_counted_in_the_time(run):
    lengths = Lengths((10, 20, 30, 4000), measured=True)
    assert lengths.over(2048) == 0.25
    assert lengths.mean(2048) == 20
    assert note_of(LENGTH, scene(run, lengths)) == "25 % of your rows are longer: dropped"
    assert note_of(LENGTH, scene(run, replace(lengths, measured=False))) == "about 25 % of your rows are longer: dropped"
    assert note_of(LENGTH, scene(replace(run, max_length=4096), lengths)) == "tokens; your longest row has 4,000"


@pytest.mark.parametrize(("part", "told"), [(0.0001, "under 0.1 %"), (0.031, "3.1 %"), (0.27, "27 %")])
def test_a_share_that_is_not_nothing_never_reads_as_nothing(part, told):
    assert share(part) == told

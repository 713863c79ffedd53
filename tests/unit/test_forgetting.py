"""General text: there, always the same, bounded, and not what the demo trains on."""

from __future__ import annotations

from qlora_tui.engine import forgetting
from qlora_tui.engine.data.builtin_docs import read_docs


def test_there_is_general_text_of_every_kind_and_always_the_same() -> None:
    found = forgetting.passages()
    assert found == forgetting.passages()
    assert forgetting.PASSAGES * 2 / 3 <= len(found) <= forgetting.PASSAGES
    assert len({passage.kind for passage in found}) == 3
    assert len({passage.text for passage in found}) == len(found)


def test_it_is_not_what_the_demo_trains_on() -> None:
    answers = [str(row["messages"][1]["content"]) for row in read_docs()]  # type: ignore[index]
    texts = [passage.text for passage in forgetting.passages()]
    assert not [answer for answer in answers if len(answer) > 60 and any(answer in text for text in texts)]


def test_its_rows_are_bounded_and_every_token_after_the_first_counts() -> None:
    found = forgetting.passages()
    rows = forgetting.rows_of(found, lambda text: [ord(char) % 250 for char in text], "", 10_000)
    assert len(rows) == len(found)
    assert all(len(row.input_ids) == forgetting.PASSAGE_TOKENS == sum(row.trained) + 1 for row in rows)
    assert {len(row.input_ids) for row in forgetting.rows_of(found, lambda text: [*map(ord, text)], "", 20)} == {20}
    assert forgetting.rows_of(found, lambda text: [1, 2, 3], "", 20) == []  # too short to say anything


def test_text_that_is_not_there_is_passed_over(monkeypatch) -> None:
    monkeypatch.setattr(forgetting, "_ABOUT", ("no-such-package",))
    monkeypatch.setattr(forgetting, "_LICENCES", ("no-such-package", "numpy"))
    assert {passage.source for passage in forgetting.passages()} >= {"numpy", "objects"}

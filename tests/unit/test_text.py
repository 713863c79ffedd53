"""Foreign text cannot steer a terminal, and secrets do not survive."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tui.engine.text import one_line, redact, safe_text, without_secrets

PAYLOADS = [
    "\x1b]52;c;AAAA\x07",  # clipboard
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",  # C1 control sequence introducer
    "a\rb",
    "\x7f\x08",
    "\u202eabc\u202c",  # bidi override
    "zero\u200bwidth",
    "\u2028line",
    "\ud800 lone surrogate",
    "\x00",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_a_terminal_would_obey_becomes_visible(payload: str) -> None:
    shown = safe_text(payload)
    assert all(char in "\n\t" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in shown)
    assert "\\" in shown


@given(st.text())
def test_no_control_character_ever_passes(text: str) -> None:
    assert not any(unicodedata.category(char) in {"Cc", "Cs"} and char not in "\n\t" for char in safe_text(text))
    assert "\n" not in one_line(text)


def test_ordinary_text_of_any_language_stays_as_it_is() -> None:
    text = "naïve 你好 مرحبا 👩\u200d🔬\n\tend"
    assert safe_text(text) == text


def test_long_text_is_cut_and_says_by_how_much() -> None:
    assert safe_text("x" * 50, limit=10) == "x" * 10 + "… (40 more characters)"


def test_what_is_no_text_is_shown_as_text() -> None:
    assert safe_text(None) == "None"
    assert one_line(ValueError("a\nb")) == "a b"


def test_tokens_and_values_of_secret_variables_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    text = redact("key correct-horse-battery and hf_abcdefghijklmnopqrstuvwx, ghp_abcdefghijklmnopqrstuvwx")
    assert text == "key [redacted] and [redacted], [redacted]"


def test_short_values_of_secret_variables_do_not_blank_ordinary_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "on")
    assert redact("going on") == "going on"


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "STRIPE_SECRET", "DB_PASSWD", "A_PASSPHRASE", "JUDGE_KEY", "AN_APIKEY", "A_CREDENTIAL"]
)
def test_variables_of_all_usual_names_are_secrets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "correct-horse-battery")
    assert redact("it is correct-horse-battery") == "it is [redacted]"


def test_a_password_in_an_address_is_redacted_and_the_address_stays() -> None:
    assert (
        redact("through http://me:pass@proxy:3128 and https://:x@host/v1")
        == "through http://[redacted]@proxy:3128 and https://[redacted]@host/v1"
    )
    for harmless in ("https://host:8080/a@b", "https://me@host/", "at 12:30 @ home", "a://b"):
        assert redact(harmless) == harmless


@given(st.integers(0, 60))
def test_no_cut_leaves_half_of_a_secret(place: int) -> None:
    key = "hf_" + "c4nary" * 5
    shown = without_secrets("x" * place + f" {key}", limit=40)
    assert "c4nary" not in shown

"""The judge's protocol against a server on loopback: what is sent, what is refused, what is tried again, and what it may cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_judge import PATH, FakeJudge, Misbehave, reply

from qlora_tui.engine.errors import EngineError, FetchError, JournalError, Stopped
from qlora_tui.engine.judge import (
    JUDGEMENTS,
    Answered,
    Endpoint,
    Prices,
    Sheet,
    address,
    alone,
    begin_answers,
    judge,
    keep_answer,
    read_pairs,
    tally,
    todo,
)
from qlora_tui.engine.judge.endpoint import Busy, Refused
from qlora_tui.engine.judge.patience import LONGEST_WAIT, ask

KEY = "sk-" + "k3y" * 8
QUESTION = [{"role": "user", "content": "which?"}]
FREE, HALF = Prices(0.0), Prices(0.20)
BUSY = Misbehave(503, {"error": {"message": "overloaded"}})


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with FakeJudge() as judge_server:
        yield judge_server


def endpoint(server: FakeJudge, **more) -> Endpoint:
    return Endpoint(address(server.url), "judge-1", KEY, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pairs; the tuned answer of rows 0 to 2 is longer, and row 3 was answered alike."""
    begin_answers(tmp_path, Sheet("a", 4, 64, 1))
    for row in range(3):
        keep_answer(tmp_path, Answered(row, f"q {row}", "w", f"short {row}", f"a longer answer {row}"))
    keep_answer(tmp_path, Answered(3, "q 3", "w", "alike", "alike"))
    return tmp_path


class Waits(list[float]):
    def __call__(self, seconds: float) -> None:
        self.append(seconds)


# what is sent


def test_what_is_sent_is_what_the_protocol_says(server: FakeJudge) -> None:
    found = endpoint(server).ask(QUESTION)
    (asked,) = server.asked
    assert asked.path == PATH
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["content-type"] == "application/json"
    assert asked.body == {"model": "judge-1", "messages": QUESTION, "temperature": 0, "max_tokens": 1024}
    assert (found.tokens_in, found.tokens_out) == (100, 5)


def test_without_a_key_no_header_is_sent(server: FakeJudge) -> None:
    Endpoint(address(server.url), "m").ask(QUESTION)
    assert "authorization" not in server.asked[0].headers


def test_an_endpoint_that_wants_other_parameters_gets_them(server: FakeJudge) -> None:
    server.script = [
        Misbehave(400, {"error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}}),
        Misbehave(400, {"error": {"message": "'temperature' does not support 0 with this model."}}),
    ]
    judge_model = endpoint(server)
    judge_model.ask(QUESTION)
    judge_model.ask(QUESTION)
    assert [sorted(asked.body) for asked in server.asked[2:]] == [["max_completion_tokens", "messages", "model"]] * 2


# what comes back


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>hello</html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": 3}',
        b"\xff\xfe",
        b'{"choices":[null]}',
    ],
)
def test_what_is_no_reply_is_refused_in_one_sentence(server: FakeJudge, body: bytes) -> None:
    server.script = [Misbehave(200, body)]
    with pytest.raises(Refused, match="does not answer as an OpenAI-compatible endpoint does"):
        endpoint(server).ask(QUESTION)


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": True}, {"prompt_tokens": 1.5}])
def test_usage_that_says_nothing_sensible_counts_as_not_said(server: FakeJudge, usage: dict) -> None:
    server.script = [Misbehave(200, reply("VERDICT: A", usage)), Misbehave(200, reply(None))]
    judge_model = endpoint(server)
    found = judge_model.ask(QUESTION)
    assert (found.tokens_in, found.tokens_out) == (None, None)
    assert judge_model.ask(QUESTION).text == ""


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "check the key"), (403, "check the key"), (404, "check the address and the model judge-1"), (400, "bad"), (402, "credit")],
)
def test_what_will_not_help_is_not_tried_again(server: FakeJudge, status: int, told: str) -> None:
    server.script = [Misbehave(status, {"error": {"message": f"bad \x1b[31m {KEY} words"}})]
    waits = Waits()
    with pytest.raises(Refused, match=told) as caught:
        ask(endpoint(server), QUESTION, wait=waits)
    assert (len(server.asked), waits) == (1, [])
    assert KEY not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert f"127.0.0.1:{server.url.split(':')[2].split('/')[0]}: {status}: bad" in str(caught.value)


def test_a_key_that_a_cut_would_halve_is_not_halved(server: FakeJudge) -> None:
    """Cutting a long error before its secrets are gone would leave the first half of a key."""
    server.script = [Misbehave(401, {"error": {"message": "x" * 290 + KEY}}), Misbehave(401, f"plain {'y' * 285} {KEY}".encode())]
    judge_model = endpoint(server)
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            judge_model.ask(QUESTION)
        assert KEY[:8] not in str(caught.value)


def test_the_key_is_in_no_representation(server: FakeJudge) -> None:
    assert KEY not in repr(endpoint(server))


def test_an_error_inside_a_200_counts_by_its_code(server: FakeJudge) -> None:
    server.script = [
        Misbehave(200, {"error": {"code": 429, "message": "slow down"}}),
        Misbehave(200, {"error": {"code": 401, "message": "no"}}),
    ]
    judge_model = endpoint(server)
    with pytest.raises(Busy, match="slow down"):
        judge_model.ask(QUESTION)
    with pytest.raises(Refused, match="check the key"):
        judge_model.ask(QUESTION)


# patience


def test_busy_is_tried_again_later_each_time(server: FakeJudge) -> None:
    server.script = [BUSY, Misbehave(429, b""), Misbehave(500, b"oops"), Misbehave(how="drop")]
    waits, lost = Waits(), []
    assert ask(endpoint(server), QUESTION, wait=waits, lost=lambda: lost.append(1)).text.startswith("VERDICT")
    assert waits == [1, 2, 4, 8]
    assert lost == [1], "only the line that broke off may be billed"


def test_retry_after_is_honoured_in_seconds_and_as_a_date(server: FakeJudge) -> None:
    server.script = [
        Misbehave(429, b"", {"Retry-After": "30"}),
        Misbehave(503, b"", {"Retry-After": "Fri, 27 Nov 2026 07:00:45 GMT"}),
        Misbehave(429, b"", {"retry-after": "soon"}),
    ]
    waits = Waits()
    ask(endpoint(server), QUESTION, wait=waits, now=lambda: 1795762800.0)  # 07:00:00
    assert waits == [30, 45, 4]


def test_five_tries_are_enough(server: FakeJudge) -> None:
    server.script = [BUSY] * 9
    waits = Waits()
    with pytest.raises(FetchError, match="overloaded, 5 times; go on later"):
        ask(endpoint(server), QUESTION, wait=waits)
    assert (len(server.asked), waits) == (5, [1, 2, 4, 8])


def test_whoever_asks_for_an_hour_is_asked_another_day(server: FakeJudge) -> None:
    server.script = [Misbehave(429, b"", {"Retry-After": str(int(LONGEST_WAIT) + 1)})]
    waits = Waits()
    with pytest.raises(FetchError, match="asks to wait 121 s"):
        ask(endpoint(server), QUESTION, wait=waits)
    assert waits == []


def test_no_reply_in_time_is_busy_and_may_be_billed(server: FakeJudge) -> None:
    server.script = [Misbehave(how="hang")]
    times = iter([0.0, 1.0, 61.0])
    with pytest.raises(Busy, match="no reply within 60 s") as caught:
        endpoint(server, timeout=60.0, clock=lambda: next(times)).ask(QUESTION)
    assert caught.value.sent


def test_a_wish_to_stop_is_obeyed_while_a_reply_is_awaited(server: FakeJudge) -> None:
    server.script = [Misbehave(how="hang")]

    def stopping() -> None:
        if server.asked:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        endpoint(server, stopping=stopping).ask(QUESTION)


def test_nobody_there_is_busy() -> None:
    with FakeJudge() as gone:
        url = address(gone.url)
    with pytest.raises(Busy, match="cannot be reached") as caught:
        Endpoint(url, "m", KEY).ask(QUESTION)
    assert not caught.value.sent


# where it goes


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_other_host_hears_nothing(server: FakeJudge, status: int) -> None:
    with FakeJudge() as other:
        server.script = [Misbehave(status, b"", {"Location": f"{other.url}/chat/completions?k={KEY}"})]
        with pytest.raises(Refused, match="it sends us on to 127") as caught:
            endpoint(server).ask(QUESTION)
        assert other.asked == []
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("where", ["file:///etc/passwd", "/v1/chat/completions", "gopher://x/", ""])
def test_no_kind_of_redirect_is_followed(server: FakeJudge, where: str) -> None:
    server.script = [Misbehave(302, b"", {"Location": where})]
    with pytest.raises(Refused):
        endpoint(server).ask(QUESTION)
    assert len(server.asked) == 1


def test_no_proxy_stands_between_us_and_this_machine(server: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeJudge() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        endpoint(server).ask(QUESTION)
        assert proxy.asked == []
        Endpoint(address("http://judge.example:1/v1", plain_http=True), "m").ask(QUESTION)
        assert proxy.asked[0].path == "http://judge.example:1/v1/chat/completions", "to other machines the person's proxy is used"


# judging


def test_each_pair_is_asked_both_ways_round_and_equal_answers_are_not(server: FakeJudge, folder: Path) -> None:
    told = []
    done = judge(folder, endpoint(server), FREE, 1.0, wait=Waits(), say=lambda *now: told.append(now))
    assert (done.replies, done.early, done.error) == (6, "", None)
    seen = [(asked.parts["prompt"], asked.parts["A"].startswith("short")) for asked in server.asked]
    assert sorted(seen) == [(f"q {row}", first) for row in range(3) for first in (False, True)]
    found = tally(read_pairs(folder), endpoint(server).name)
    assert (found.wins, found.losses, found.ties, found.same) == (3, 0, 0, 1)
    assert told[-1] == (6, 6, 0.0)
    assert KEY not in (folder / JUDGEMENTS).read_text()


def test_a_judge_that_looks_at_the_place_alone_sees_ties(folder: Path) -> None:
    with FakeJudge(lambda parts: "VERDICT: A") as server:
        judge(folder, endpoint(server), FREE, 1.0, wait=Waits())
        found = tally(read_pairs(folder), endpoint(server).name)
    assert (found.wins, found.losses, found.ties, found.rate) == (0, 0, 3, 0.5)


def test_nothing_is_asked_or_paid_for_twice(server: FakeJudge, folder: Path) -> None:
    server.script = [
        Misbehave(200, reply("VERDICT: A")),
        Misbehave(200, reply("VERDICT: A")),
        Misbehave(200, reply("VERDICT: A")),
        Misbehave(401),
    ]
    first = judge(folder, endpoint(server), HALF, 9.0, wait=Waits())
    assert (first.replies, type(first.error)) == (3, Refused)
    before = len(server.asked)
    second = judge(folder, endpoint(server), HALF, 9.0, wait=Waits())
    assert (second.replies, len(server.asked) - before) == (3, 3)
    asked = [json.dumps(asked.body) for asked in server.asked]
    assert len(set(asked)) == 6, "the one that was refused was asked again, and no other"
    assert judge(folder, endpoint(server), HALF, 9.0, wait=Waits()).replies == 0
    assert read_pairs(folder).dollars(endpoint(server).name) == pytest.approx(0.6)
    assert todo(read_pairs(folder), "another judge"), "another judge has said nothing yet"


def test_a_price_cap_stops_before_it_is_passed_and_counts_what_was_spent_before(server: FakeJudge, folder: Path) -> None:
    first = judge(folder, endpoint(server), HALF, 0.25, wait=Waits())
    assert (first.replies, first.dollars, first.error) == (2, pytest.approx(0.2), None)
    assert "could pass --max-cost" in first.early
    assert judge(folder, endpoint(server), HALF, 0.25, wait=Waits()).replies == 0
    assert judge(folder, endpoint(server), HALF, 0.61, wait=Waits()).replies == 4
    assert len(server.asked) == 6


def test_what_was_used_is_counted_and_not_what_was_feared(server: FakeJudge, folder: Path) -> None:
    prices = Prices(0.2, tokens_in=10.0, tokens_out=1000.0)  # a reply may take 1,024 tokens: more than a dollar
    usage = {"prompt_tokens": 100, "completion_tokens": 5}
    done = judge(folder, endpoint(server), prices, 1.1, wait=Waits())
    assert done.dollars == pytest.approx(done.replies * (100 * 10 + 5 * 1000) / 1e6)
    assert 0 < done.replies == len(server.asked)
    calls = [found.call for found in read_pairs(folder).judgements]
    assert {(call.tokens_in, call.tokens_out) for call in calls if call} == {(usage["prompt_tokens"], usage["completion_tokens"])}


def test_a_question_that_got_no_reply_counts_towards_the_cap(server: FakeJudge, folder: Path) -> None:
    server.script = [Misbehave(how="drop")]
    done = judge(folder, endpoint(server), HALF, 0.25, wait=Waits())
    assert (done.replies, done.dollars) == (1, pytest.approx(0.2))


def test_asking_again_cannot_pass_the_cap_either(server: FakeJudge, folder: Path) -> None:
    server.script = [Misbehave(how="drop")] * 3
    done = judge(folder, endpoint(server), HALF, 0.15, wait=Waits())
    assert (done.replies, done.dollars, done.error, len(server.asked)) == (0, pytest.approx(0.1), None, 1)
    assert "may be billed" in done.early


def test_replies_without_a_verdict_do_not_count_and_many_of_them_end_it(folder: Path) -> None:
    with FakeJudge(lambda parts: "I would rather not say.") as server:
        done = judge(folder, endpoint(server), HALF, 9.0, wait=Waits())
        assert (done.replies, len(server.asked)) == (4, 4)
        assert "hold no verdict" in str(done.error)
        found = tally(read_pairs(folder), endpoint(server).name)
    assert (found.unclear, found.wins + found.losses + found.ties) == (2, 0)


def test_a_single_unclear_reply_ends_nothing(server: FakeJudge, folder: Path) -> None:
    server.script = [Misbehave(200, reply("hm"))]
    done = judge(folder, endpoint(server), FREE, 0.0, wait=Waits())
    assert (done.replies, done.early) == (6, "")
    found = tally(read_pairs(folder), endpoint(server).name)
    assert (found.wins, found.unclear) == (2, 1)


def test_a_person_who_stops_it_keeps_what_came(server: FakeJudge, folder: Path) -> None:
    def stopping() -> None:
        if len(server.asked) >= 3:
            raise Stopped("asked to stop")

    server.script = [Misbehave(200, reply("VERDICT: A"))] * 2 + [Misbehave(how="hang")]
    done = judge(folder, endpoint(server, stopping=stopping), FREE, 1.0, wait=Waits())
    assert (done.early, done.error) == ("asked to stop", None)
    assert len(read_pairs(folder).judgements) == done.replies == 2


def test_two_sessions_do_not_pay_for_the_same_pairs(server: FakeJudge, folder: Path) -> None:
    with alone(folder, JUDGEMENTS), pytest.raises(JournalError, match="another process"):
        judge(folder, endpoint(server), FREE, 1.0, wait=Waits())
    assert server.asked == []


def test_a_reply_that_cannot_be_kept_ends_it(server: FakeJudge, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever cannot be kept would be paid for again."""

    def full(*_: object) -> None:
        raise JournalError("judgements.jsonl cannot be written: No space left on device")

    monkeypatch.setattr("qlora_tui.engine.judge.judging.keep_judgement", full)
    with pytest.raises(EngineError, match="No space left"):
        judge(folder, endpoint(server), FREE, 1.0, wait=Waits())
    assert len(server.asked) == 1

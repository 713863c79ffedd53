"""Which of two answers is better: what the base and the tuned model said, who preferred which, and how sure that is.

The answers are made in a process of their own (`train.answers`); a person judges them with two keys, or an OpenAI-compatible
endpoint does. Everything is kept in the run folder, line by line, so that nothing is asked or paid for twice. Nothing here
imports torch, and nothing here opens a connection but `Endpoint.ask`.
"""

from qlora_tui.engine.hooks import is_loopback
from qlora_tui.engine.judge.endpoint import USUAL_KEY, Endpoint, address, key_from
from qlora_tui.engine.judge.judging import Judged, Todo, judge, todo
from qlora_tui.engine.judge.kept import (
    ANSWER_TOKENS,
    ANSWERS,
    JUDGEMENTS,
    ME,
    USUAL_ROWS,
    Answered,
    Judgement,
    Pairs,
    Said,
    Sheet,
    adapter_digest,
    alone,
    are_there,
    begin_answers,
    keep_answer,
    keep_judgement,
    read_pairs,
    wanted_pairs,
)
from qlora_tui.engine.judge.prices import Prices, keep_prices, prices_of, reply_tokens
from qlora_tui.engine.judge.question import size_of
from qlora_tui.engine.judge.tally import Tally, document, percents, tallies, tally, words_of

__all__ = [
    "ANSWERS",
    "ANSWER_TOKENS",
    "JUDGEMENTS",
    "ME",
    "USUAL_KEY",
    "USUAL_ROWS",
    "Answered",
    "Endpoint",
    "Judged",
    "Judgement",
    "Pairs",
    "Prices",
    "Said",
    "Sheet",
    "Tally",
    "Todo",
    "adapter_digest",
    "address",
    "alone",
    "are_there",
    "begin_answers",
    "document",
    "is_loopback",
    "judge",
    "keep_answer",
    "keep_judgement",
    "keep_prices",
    "key_from",
    "percents",
    "prices_of",
    "read_pairs",
    "reply_tokens",
    "size_of",
    "tallies",
    "tally",
    "todo",
    "wanted_pairs",
    "words_of",
]

"""Datasets: what a row holds, how it is read, rendered, masked, measured and held out. Nothing here imports torch."""

from qlora_tui.engine.data.chat import Chat, Format, Refusal, Row, Turn
from qlora_tui.engine.data.facts import describe
from qlora_tui.engine.data.formats import FORMATS, detect
from qlora_tui.engine.data.load import Dataset, Source, load, load_eval
from qlora_tui.engine.data.prepare import PreparedFacts, Tokenized, prepare
from qlora_tui.engine.data.render import Renderer, TokenRow
from qlora_tui.engine.data.sources import absolute, train_alone
from qlora_tui.engine.data.store import TokenRows, lengths_of, numbers_of
from qlora_tui.engine.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "FORMATS",
    "Chat",
    "Dataset",
    "Format",
    "PreparedFacts",
    "Refusal",
    "Renderer",
    "Row",
    "Source",
    "TokenRow",
    "TokenRows",
    "Tokenized",
    "Tokenizer",
    "Turn",
    "absolute",
    "describe",
    "detect",
    "lengths_of",
    "load",
    "load_eval",
    "load_tokenizer",
    "numbers_of",
    "prepare",
    "train_alone",
]

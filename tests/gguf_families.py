"""Small models with random weights, one of each family that is written as GGUF, with tokenizers built as the families' are.

The tokenizers cut, normalize and merge as the published ones do; only their vocabularies are small, trained on this
repository's own pages. The weights are large enough that positions, heads and windows all show in the losses.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chat_families
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_tui.engine.data import TokenRow, load_tokenizer

ROOT = Path(__file__).parents[1]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACE = "\u2581"
NASTY = (
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces\tand\t\ttabs",
    "lines\n\nand\r\nmore\n\n\n  indented\n",
    "1 12 123 1234 12345 3.14 x2y33z444 2024-11-27",
    "I'll, we've; she'D don't 'tis It'S",
    "Ünïcödé, naïve, Straße, Ωmega, Привет, 你好，世界, こんにちは, 한국어, العربية, हिन्दी, ไทย",
    "emoji \U0001f680 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f and \u2028 odd \u00a0 spaces \u3000",
    "def f(x):\n\treturn {'a': [x*2, -1]}  # ok\n\n\nif __name__ == \"__main__\":\n    f(3)",
    "<html><p>a &amp; b</p></html> http://x.org/?q=1&r=%20 CamelCase HTTPServer snake_case",
    "",
)


def corpus() -> list[str]:
    """Text to train vocabularies on: this repository's pages, and the hard cases once."""
    pages = [ROOT / "README.md", ROOT / "engine" / "README.md", ROOT / "engine" / "spec.py", ROOT / "engine" / "errors.py"]
    return [path.read_text(encoding="utf-8") for path in pages] + list(NASTY)


def bpe(
    splitter: Any, specials: Iterable[str], *, whole_words: bool = False, normalizer: Any = None, plain: Iterable[str] = ()
) -> Tokenizer:
    """Train a byte-level tokenizer that cuts with `splitter`; `plain` are added tokens that are text and not control."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def by_pattern(pattern: str) -> Any:
    """Return the splitter of a family whose words are cut by a pattern."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def sentence_pieces(first: Iterable[str], specials: Iterable[str], *, unknown: str, prefix: str = "") -> Tokenizer:
    """Train as SentencePiece does and convert as transformers does: bytes to fall back on, every way to build a piece a merge.

    `first` are the tokens before the bytes, `prefix` is what puts a space before text: nothing, `always` or `first`.
    """
    before = [*first, *(f"<0x{number:02X}>" for number in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=700, limit_alphabet=90, show_progress=False))
    rules = json.loads(trained.to_str())["model"]
    merged = [left + right for left, right in (pair if isinstance(pair, list) else pair.split(" ") for pair in rules["merges"])]
    letters = [token for token in sorted(rules["vocab"], key=rules["vocab"].__getitem__) if len(token) == 1]
    runs = [SPACE * length for length in range(8, 1, -1)]
    pieces = [*dict.fromkeys([*runs, *merged])]
    vocab = {token: index for index, token in enumerate([*before, *pieces, *letters])}
    ways = [(token[:cut], token[cut:]) for token in pieces for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=ways, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    if prefix == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return tokenizer


def starting(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Let `tokenizer` put `bos` before a text, as its family does."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


@dataclass(frozen=True)
class Case:
    """One small model: its settings beside the small sizes, its tokenizer and its chat template."""

    settings: dict[str, object]
    tokenizer: Callable[[], Tokenizer]
    chat: chat_families.Family
    pre: str
    eos: str = ""
    without: frozenset[str] = field(default_factory=frozenset)


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LLAMA_SPECIALS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA_FIRST = ("<pad>", "<eos>", "<bos>", "<unk>")
_INST = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_GPT2 = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2()])


CASES = {
    "llama": Case(
        {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": _LLAMA3_ROPE},
        lambda: starting(bpe(by_pattern(LLAMA3), _LLAMA_SPECIALS, whole_words=True), "<|begin_of_text|>"),
        chat_families.LLAMA3,
        "llama-bpe",
    ),
    "smollm": Case(
        {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_theta": 10000.0},
        lambda: bpe(_smollm(), _IM),
        chat_families.CHATML,
        "smollm",
    ),
    "llama2": Case(
        {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        lambda: starting(sentence_pieces(("<unk>", "<s>", "</s>"), ("<unk>", "<s>", "</s>"), unknown="<unk>", prefix="always"), "<s>"),
        chat_families.LLAMA2,
        "default",
    ),
    "mistral": Case(
        {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 300},
        lambda: starting(
            sentence_pieces(("<unk>", "<s>", "</s>", *_INST), ("<unk>", "<s>", "</s>", *_INST), unknown="<unk>", prefix="first"), "<s>"
        ),
        chat_families.MISTRAL_V7,
        "default",
    ),
    "tekken": Case(
        {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": None},
        lambda: starting(bpe(by_pattern(TEKKEN), ("<unk>", "<s>", "</s>", *_INST), whole_words=True), "<s>"),
        chat_families.MISTRAL_TEKKEN,
        "tekken",
    ),
    "qwen2": Case(
        {
            "model_type": "qwen2",
            "head_dim": 16,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
        lambda: bpe(by_pattern(QWEN), _IM, normalizer=normalizers.NFC(), plain=("<tool_call>", "</tool_call>")),
        chat_families.CHATML,
        "qwen2",
    ),
    "qwen3": Case(
        {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 10000.0},
        lambda: bpe(by_pattern(QWEN), _IM, normalizer=normalizers.NFC(), plain=("<think>", "</think>")),
        chat_families.CHATML,
        "qwen2",
    ),
    "gemma3": Case(
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
            "rope_theta": 100000.0,
            "rope_local_base_freq": 1000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        lambda: starting(sentence_pieces(_GEMMA_FIRST, (*_GEMMA_FIRST, "<start_of_turn>", "<end_of_turn>"), unknown="<unk>"), "<bos>"),
        chat_families.GEMMA3,
        "default",
    ),
    "gemma2": Case(
        {
            "model_type": "gemma2",
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        lambda: starting(sentence_pieces(_GEMMA_FIRST, (*_GEMMA_FIRST, "<start_of_turn>", "<end_of_turn>"), unknown="<unk>"), "<bos>"),
        chat_families.GEMMA2,
        "default",
    ),
    "smollm3": Case(
        {"model_type": "smollm3", "head_dim": 16, "num_hidden_layers": 5, "rope_theta": 10000.0},
        lambda: bpe(by_pattern(LLAMA3), _IM, whole_words=True),
        chat_families.CHATML,
        "llama-bpe",
    ),
    "granite": Case(
        {
            "model_type": "granite",
            "head_dim": 16,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        lambda: bpe(_smollm(), _IM),
        chat_families.CHATML,
        "smollm",
    ),
}


def build(case: Case, folder: Path, *, spare: int = 5, seed: int = 0) -> Path:
    """Write the model of `case` as a merged 16-bit folder; the embedding has `spare` rows more than there are tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = case.tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = case.eos or case.chat.eos
    names = {"bos_token": case.chat.bos or None, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in names.items() if value}))
    (folder / "chat_template.jinja").write_text(case.chat.template, encoding="utf-8")
    stops = [tokenizer.token_to_id(token) for token in (eos, *case.chat.stops)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    config = CONFIG_MAPPING[str(case.settings["model_type"])].from_dict(
        {
            **SIZES,
            "vocab_size": tokenizer.get_vocab_size() + spare,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": stops[0],
            **case.settings,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:  # norms and biases start as ones and zeros, on which faults do not show
            torch.nn.init.normal_(weight, 0.0 if "bias" in name or "gemma" in str(case.settings["model_type"]) else 1.0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def rows_of(folder: Path, texts: Iterable[str] = NASTY) -> list[TokenRow]:
    """Return the texts as rows; the first three tokens of each are not trained."""
    tokenizer = load_tokenizer(folder)
    rows = [(number, tokenizer.encode(text)[0]) for number, text in enumerate(texts)]
    return [TokenRow(number, array("i", ids), bytes([0] * 3 + [1] * (len(ids) - 3))) for number, ids in rows if len(ids) > 4]


def losses(model: Any, rows: list[TokenRow]) -> list[float]:
    """Return the mean loss of each row by transformers alone, in nats a trained token."""
    found = []
    for row in rows:
        ids = torch.tensor([list(row.input_ids)])
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        chosen = torch.tensor(list(row.trained[1:]), dtype=torch.bool)
        found.append(-float(scores.gather(1, ids[0, 1:, None])[:, 0][chosen].mean()))
    return found

"""Masks: for templates in the style of real model families, exactly the answers and their end tokens are trained."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_families import trained_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import Chat, Renderer, Row, Tokenizer, Turn, load_tokenizer
from qlora_tui.engine.errors import BadRow, ModelError


@dataclass(frozen=True)
class Family:
    """A chat template, its special tokens, and what it does to content."""

    template: str
    specials: tuple[str, ...]
    end: str
    bos: str = ""
    eos: str = ""
    strips: bool = False
    lead: str = ""  # spaces a model writes before its answer
    system: str = "kept"  # kept, folded


SMOLLM = Family(
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    bos="<|im_start|>",
    eos="<|im_end|>",
)
LLAMA = Family(
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}{{- system }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|eot_id|>",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    strips=True,
)
MISTRAL = Family(
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    bos="<s>",
    eos="</s>",
    strips=True,
    lead=" ",
    system="folded",
)
GEMMA = Family(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "<end_of_turn>",
    bos="<bos>",
    eos="<eos>",
    strips=True,
    system="folded",
)
PHI = Family(
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|end|>",
    eos="<|endoftext|>",
)
ZEPHYR = Family(
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("<s>", "</s>"),
    "</s>",
    bos="<s>",
    eos="</s>",
    lead="\n",
)
QWEN3 = Family(
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    eos="<|im_end|>",
)
UNENDED = Family(
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
    ("</s>",),
    "</s>",
    eos="</s>",
)
FAMILIES = {"smollm": SMOLLM, "llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "phi": PHI, "zephyr": ZEPHYR}
CORPUS = ["the answer is the\n\nthe other answer, and then some more of the same in the end", "### user: what is it?\n\n"] * 3

Make = Callable[..., Tokenizer]


def write(folder: Path, family: Family, *, merges: bool = False, words: bool = False, adds_bos: bool = False) -> Path:
    """Write a tokenizer folder for `family`: bytes, bytes with learned merges, or whole words."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if words:
        backend = Backend(models.WordLevel(vocab={"[UNK]": 0, "yes": 1, "no": 2, "why": 3}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        backend = Backend(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    if merges:
        backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.specials])
    steps: list[object] = [processors.ByteLevel(trim_offsets=True)]
    if adds_bos:
        steps.append(
            processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))])
        )
    backend.post_processor = processors.Sequence(steps)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": family.bos, "eos_token": family.eos}
    config["chat_template"] = family.template
    if words:
        config["unk_token"] = "[UNK]"
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a tokenizer once for each family and kind."""
    made: dict[object, Tokenizer] = {}

    def make_one(family: Family, **kind: bool) -> Tokenizer:
        key = (family, tuple(kind.items()))
        if key not in made:
            made[key] = load_tokenizer(write(tmp_path_factory.mktemp("tokenizer") / "model", family, **kind))
        return made[key]

    return make_one


def chat(*contents: str, system: str | None = None) -> Row:
    roles = ("user", "assistant")
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn(roles[index % 2], content) for index, content in enumerate(contents)]  # type: ignore[arg-type]
    return Row(1, 1, Chat(tuple(turns)))


def expected(family: Family, answers: Sequence[str]) -> list[str]:
    return [family.lead + (answer.strip() if family.strips else answer) + family.end for answer in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_end_tokens_are_trained_and_nothing_else(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family)
    tokens = Renderer(tokenizer).tokens(chat("why?", "  Because so. \n", "really?", "yes"))
    assert trained_texts(tokens, tokenizer) == expected(family, ["  Because so. \n", "yes"])
    assert len(tokens.trained) == len(tokens.input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_kept_or_folded_and_never_trained(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family)
    renderer = Renderer(tokenizer)
    tokens = renderer.tokens(chat("why?", "so", system="Be brief."))
    text = tokenizer.decode(tokens.input_ids)
    assert "Be brief." in text
    assert trained_texts(tokens, tokenizer) == expected(family, ["so"])
    assert any("takes no system turn" in note for note in renderer.notes()) == (family.system == "folded")


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_tokens_never_reach_from_the_prompt_into_the_answer(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family, merges=True)
    row = chat("what is it?", "\n\nthe answer\n")
    tokens = Renderer(tokenizer).tokens(row)
    (text,) = trained_texts(tokens, tokenizer)
    assert expected(family, ["\n\nthe answer\n"])[0].endswith(text)
    assert text.endswith("the answer" + ("" if family.strips else "\n") + family.end)


@pytest.mark.parametrize("name", FAMILIES)
def test_word_tokenizers_are_masked_too(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family, words=True)
    tokens = Renderer(tokenizer).tokens(chat("why", "yes no"))
    answer = [index for index, trained in zip(tokens.input_ids, tokens.trained, strict=True) if trained]
    assert answer == [1, 2, tokenizer.added[family.end]]


@pytest.mark.parametrize("family", [LLAMA, MISTRAL, GEMMA])
def test_there_is_exactly_one_bos(make: Make, family: Family) -> None:
    tokenizer = make(family, adds_bos=True)
    tokens = Renderer(tokenizer).tokens(chat("why?", "so"))
    assert list(tokens.input_ids).count(tokenizer.added[family.bos]) == 1
    assert tokens.input_ids[0] == tokenizer.added[family.bos]


def test_a_template_that_does_not_end_the_last_answer_gets_an_end_token(make: Make) -> None:
    tokenizer = make(UNENDED)
    renderer = Renderer(tokenizer)
    tokens = renderer.tokens(chat("a?", "one", "b?", "two"))
    assert trained_texts(tokens, tokenizer) == ["one", "two</s>"]
    assert any("was added and is trained" in note for note in renderer.notes())


def test_an_end_token_that_comes_with_the_next_message_is_trained(make: Make) -> None:
    late = Family(
        "{% for message in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}"
        "{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token + 'assistant: ' }}{% endif %}",
        ("</s>",),
        "</s>",
        eos="</s>",
    )
    tokenizer = make(late)
    assert trained_texts(Renderer(tokenizer).tokens(chat("a?", "one", "b?", "two")), tokenizer) == ["one</s>", "two</s>"]


def test_the_first_word_of_an_answer_is_trained_when_its_space_belongs_to_it(make: Make) -> None:
    tokenizer = make(MISTRAL, merges=True)
    tokens = Renderer(tokenizer).tokens(chat("why?", "the end"))
    assert trained_texts(tokens, tokenizer) == [" the end</s>"]


@pytest.mark.parametrize("normalized", [False, True])
def test_sentencepiece_tokenizers_train_the_first_word_too(tmp_path: Path, normalized: bool) -> None:
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *alphabet], show_progress=False)
    backend.train_from_iterator(["[INST] why is the end the end? [/INST] the end of the end"] * 5, trainer)
    if normalized:  # how older conversions of the same tokenizers spell it
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in MISTRAL.specials])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": MISTRAL.template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    tokens = Renderer(tokenizer).tokens(chat("why is the end?", "the end é🙂"))
    assert trained_texts(tokens, tokenizer) == [" the end é🙂</s>"]


def test_a_model_without_tokenizer_json_is_read_from_its_older_files(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer = load_tokenizer(tmp_path)
    assert "has no tokenizer.json" in tokenizer.note
    plain = Row(1, 1, Chat((Turn("user", "a"), Turn("assistant", " b")), plain=True))
    assert trained_texts(Renderer(tokenizer).tokens(plain), tokenizer) == [" b<|endoftext|>"]


def test_answers_in_several_turns_are_followed_where_only_the_last_gets_a_thought(make: Make) -> None:
    tokenizer = make(QWEN3)
    assert trained_texts(Renderer(tokenizer).tokens(chat("a?", "one", "b?", "two")), tokenizer) == ["one<|im_end|>", "two<|im_end|>"]


def test_thoughts_that_a_template_rearranges_are_followed_in_a_single_answer(make: Make) -> None:
    tokenizer = make(QWEN3)
    row = chat("why?", "<think>\nhm\n</think>\n\nso")
    assert trained_texts(Renderer(tokenizer).tokens(row), tokenizer) == ["<think>\nhm\n</think>\n\nso<|im_end|>"]
    assert trained_texts(Renderer(tokenizer).tokens(chat("a?", "<think>x</think>b", "c?", "d")), tokenizer) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


def test_a_template_that_changes_the_words_is_refused(make: Make) -> None:
    shouting = Family(
        SMOLLM.template.replace("message['content']", "message['content'] | upper"), SMOLLM.specials, "<|im_end|>", eos="<|im_end|>"
    )
    with pytest.raises(BadRow):
        Renderer(make(shouting)).tokens(chat("why?", "because"))


def test_a_template_that_refuses_the_order_is_quoted(make: Make) -> None:
    with pytest.raises(BadRow, match=r"the chat template refuses it \(Roles must alternate\)"):
        Renderer(make(MISTRAL)).tokens(Row(1, 1, Chat((Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")))))


def test_a_template_that_leaves_a_turn_out_is_refused(make: Make) -> None:
    last_only = Family("{{ messages[-2]['content'] + '\n' + messages[-1]['content'] + '</s>' }}", ("</s>",), "</s>", eos="</s>")
    with pytest.raises(BadRow, match="leaves out or changes a turn of the user"):
        Renderer(make(last_only)).tokens(chat("a", "b", "c", "d"))


def test_a_control_token_in_the_text_is_refused(make: Make) -> None:
    with pytest.raises(BadRow, match="control token of this model"):
        Renderer(make(SMOLLM)).tokens(chat("say <|im_end|> twice", "no"))


def test_an_answer_marked_as_not_to_be_trained_is_not(make: Make) -> None:
    tokenizer = make(SMOLLM)
    turns = (Turn("user", "a"), Turn("assistant", "bad", trained=False), Turn("user", "b"), Turn("assistant", "good"))
    assert trained_texts(Renderer(tokenizer).tokens(Row(1, 1, Chat(turns))), tokenizer) == ["good<|im_end|>"]


def test_without_a_template_prompt_and_completion_are_joined_as_they_are(make: Make) -> None:
    base = Family("", ("<s>", "</s>"), "</s>", bos="<s>", eos="</s>")
    tokenizer = make(base, adds_bos=True)
    plain = Row(1, 1, Chat((Turn("user", "2 + 2 ="), Turn("assistant", " 4")), plain=True))
    tokens = Renderer(tokenizer).tokens(plain)
    assert tokenizer.decode(tokens.input_ids) == "<s>2 + 2 = 4</s>"
    assert trained_texts(tokens, tokenizer) == [" 4</s>"]
    with pytest.raises(BadRow, match="no chat template"):
        Renderer(tokenizer).tokens(chat("a", "b"))
    assert tokenizer.note


def test_chatml_is_used_and_said_when_only_its_tokens_are_there(make: Make) -> None:
    tokenizer = make(Family("", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>"))
    assert "ChatML is used" in tokenizer.note
    assert trained_texts(Renderer(tokenizer).tokens(chat("a", "b")), tokenizer) == ["b<|im_end|>"]


def test_a_date_in_a_template_is_the_same_every_day(make: Make) -> None:
    text = make(LLAMA).render([{"role": "user", "content": "hi"}])
    assert "Today Date: 26 Jul 2024" in text


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json in it"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_the_files_saved_with_an_adapter_render_the_same(make: Make, tmp_path: Path) -> None:
    tokenizer = make(LLAMA, merges=True, adds_bos=True)
    tokenizer.save(tmp_path / "adapter")
    again = load_tokenizer(tmp_path / "adapter")
    row = chat("what is the answer?", "the answer")
    assert Renderer(again).tokens(row) == Renderer(tokenizer).tokens(row)


def test_stop_tokens_come_from_the_tokenizer_and_the_generation_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", GEMMA)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 259]}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.stop_ids() == {257, 259}
    assert tokenizer.vocab_size == 260


def test_an_end_token_that_would_not_stop_the_model_is_told(make: Make) -> None:
    assert any("Answers end with <end_of_turn>" in note for note in Renderer(make(GEMMA)).notes())
    assert Renderer(make(SMOLLM)).notes() == ()


def test_the_light_path_gives_the_ids_of_autotokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path / "model", LLAMA, merges=True, adds_bos=True)
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "the answer é 🙂"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=True, return_dict=False, date_string="26 Jul 2024"
    )
    ours = Renderer(load_tokenizer(folder)).tokens(chat("what is it?", "the answer é 🙂"))
    assert list(ours.input_ids) == theirs


def test_preparing_data_loads_no_torch(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SMOLLM)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    code = (
        "import sys; from pathlib import Path; from qlora_tui.engine import data; from qlora_tui.engine.spec import RunConfig\n"
        f"run = RunConfig(data=({str(tmp_path / 'rows.jsonl')!r},)); tokenizer = data.load_tokenizer(Path({str(folder)!r}))\n"
        "rows = data.load(run); assert data.prepare(run, rows, tokenizer).train; data.describe(run, rows, tokenizer, 1)\n"
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).returncode == 0


content = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
padded = st.builds(
    lambda before, text, after: before + text + after,
    st.sampled_from(["", " ", "\n", " \n\t", "\u3000"]),
    content,
    st.sampled_from(["", " ", "\n\n", "\t "]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), contents=st.lists(padded, min_size=1, max_size=3), system=st.none() | padded)
def test_any_content_is_masked_to_the_character(make: Make, data: st.DataObject, contents: list[str], system: str | None) -> None:
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    tokenizer = make(family)
    turns = [text for answer in contents for text in (answer[::-1], answer)]
    row = chat(*turns, system=system)
    tokens = Renderer(tokenizer).tokens(row)
    assert trained_texts(tokens, tokenizer) == expected(family, contents)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), answer=padded)
def test_merges_may_cost_leading_spaces_and_nothing_else(make: Make, data: st.DataObject, answer: str) -> None:
    family = FAMILIES[data.draw(st.sampled_from(sorted(FAMILIES)))]
    tokenizer = make(family, merges=True)
    (text,) = trained_texts(Renderer(tokenizer).tokens(chat("what is it?", answer)), tokenizer)
    (whole,) = expected(family, [answer])
    assert whole.endswith(text)
    assert not whole.removesuffix(text).strip()

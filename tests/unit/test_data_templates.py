"""Chat templates in the formats of model families: tokens and mask of each are those worked out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from chat_families import (
    ALPACA,
    CHATML,
    DEEPSEEK,
    FAMILIES,
    GEMMA2,
    HARMONY,
    LLAMA3,
    MISTRAL_V3,
    OLMO,
    QWEN3,
    QWEN25,
    SMOLLM3,
    VICUNA,
    Family,
    trained_texts,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_tui.engine.data import Chat, Renderer, Row, Tokenizer, Turn, load_tokenizer
from qlora_tui.engine.errors import BadRow, ModelError

Make = Callable[..., Tokenizer]
Merges = tuple[tuple[str, str], ...]
NEW_LINE = "Ċ"  # how a byte-level vocabulary writes it; Ġ is a space


def write(folder: Path, family: Family, merges: Merges = (), *, pad: str = "", roomy: bool = False) -> Path:
    """Write a tokenizer folder for a family: bytes, the merges named, and the family's special tokens."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=roomy) for token in family.specials])
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": family.bos, "eos_token": family.eos, "chat_template": family.template, "pad_token": pad}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {key: value for key, value in config.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    stops = [backend.token_to_id(token) for token in family.stops]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops} if stops else {}))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a tokenizer once for each family and kind."""
    made: dict[object, Tokenizer] = {}

    def make_one(family: Family, merges: Merges = (), chat_template: str = "auto", **kind: object) -> Tokenizer:
        key = (family, merges, chat_template, tuple(kind.items()))
        if key not in made:
            folder = write(tmp_path_factory.mktemp("tokenizer") / "model", family, merges, **kind)  # type: ignore[arg-type]
            made[key] = load_tokenizer(folder, chat_template)
        return made[key]

    return make_one


def chat(*contents: str, system: str = "") -> Row:
    """Make a row of questions and answers in turn."""
    turns = [Turn("system", system)] if system else []
    turns += [Turn("assistant" if index % 2 else "user", content) for index, content in enumerate(contents)]
    return Row(1, 1, Chat(tuple(turns)))


FULL = chat("Why?", " Because.\n", "Sure?", "Yes.", system="Be brief.")
BARE = chat("Hi", "Hello.")


def by_hand(marked: str, tokenizer: Tokenizer, family: Family) -> tuple[list[int], list[int]]:
    """Return ids and mask of a text with « and » around what is trained, for a tokenizer of bytes and special tokens."""
    ids: list[int] = []
    mask: list[int] = []
    trained = 0
    for piece in re.split("(" + "|".join(map(re.escape, ("«", "»", *family.specials))) + ")", marked):
        if piece in ("«", "»"):
            trained = int(piece == "«")
            continue
        found = [tokenizer.added[piece]] if piece in family.specials else [tokenizer.encode(letter)[0] for letter in piece]
        flat = found if piece in family.specials else [index for each in found for index in each]  # type: ignore[union-attr]
        ids += flat  # type: ignore[arg-type]
        mask += [trained] * len(flat)
    return ids, mask


def between(marked: str) -> list[str]:
    return re.findall("«(.*?)»", marked, re.DOTALL)


def trained_of(tokenizer: Tokenizer, row: Row, **kind: bool) -> list[str]:
    return trained_texts(Renderer(tokenizer, **kind).tokens(row), tokenizer)


def test_there_are_at_least_fifteen_families() -> None:
    assert len(FAMILIES) >= 15


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_and_mask_are_those_worked_out_by_hand(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family)
    for row, marked in ((FULL, family.full), (BARE, family.bare)):
        tokens = Renderer(tokenizer).tokens(row)
        assert tokenizer.decode(tokens.input_ids) == marked.replace("«", "").replace("»", "")
        assert (list(tokens.input_ids), list(tokens.trained)) == by_hand(marked, tokenizer, family)
        assert trained_texts(tokens, tokenizer) == between(marked)


MERGES: Merges = (
    (NEW_LINE, NEW_LINE),
    (NEW_LINE, "Ġ"),
    ("Ġ", "B"),
    ("Ġ", "Y"),
    (".", NEW_LINE),
    (":", "Ġ"),
    ("Ġ", "Ġ"),
    ("=", "Y"),
    ("=", "Ġ"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_over_the_border_of_prompt_and_answer_is_cut_there(make: Make, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = make(family, MERGES)
    tokens = Renderer(tokenizer).tokens(FULL)
    assert tokenizer.decode(tokens.input_ids) == family.full.replace("«", "").replace("»", "")
    assert trained_texts(tokens, tokenizer) == between(family.full)


def test_the_prompt_is_tokenized_as_it_is_when_the_model_answers(make: Make) -> None:
    tokenizer = make(CHATML, ((NEW_LINE, "Ġ"),))
    tokens = Renderer(tokenizer).tokens(chat("Why?", " Because."))
    prompt, _ = tokenizer.encode(tokenizer.render([{"role": "user", "content": "Why?"}], answer_next=True))
    assert list(tokens.input_ids)[: len(prompt)] == prompt
    assert not any(tokens.trained[: len(prompt)])
    assert tokens.trained[len(prompt)]


words = st.text("ab .\n:=?é", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(FAMILIES)), merged=st.booleans(), contents=st.lists(words, min_size=1, max_size=3), last=st.booleans())
def test_the_mask_read_back_is_each_answer_and_its_end_token(make: Make, name: str, merged: bool, contents: list[str], last: bool) -> None:
    family = FAMILIES[name]
    tokenizer = make(family, MERGES if merged else ())
    texts = [text for answer in contents for text in ("q " + answer + "?", answer)]
    found = trained_of(tokenizer, chat(*texts), mask_history=last)
    wanted = contents[-1:] if last else contents
    assert len(found) == len(wanted)
    before, _, end = between(family.full)[1].partition("Yes.")
    inner = between(family.full)[0].partition("Because.")[2].removeprefix("\n").removeprefix(" \n")
    for place, (text, answer) in enumerate(zip(found, wanted, strict=True)):
        closing = end if place == len(wanted) - 1 else inner
        spellings = {before + written + closing for written in (answer, answer.strip(), answer.lstrip("\n"))}
        assert text in spellings


def test_a_pad_token_that_is_the_end_token_hides_no_end_token(make: Make) -> None:
    tokenizer = make(VICUNA, pad="</s>")
    assert tokenizer.pad_id == tokenizer.eos_id
    assert trained_of(tokenizer, FULL) == [" Because.</s>", " Yes.</s>"]


def test_special_tokens_that_take_spaces_along_leave_the_answer_its_own(make: Make) -> None:
    tokenizer = make(CHATML, roomy=True)
    assert trained_of(tokenizer, chat("Why?", " Because.\n", "Sure?", "Yes.")) == [" Because.\n<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_last_answer_is_trained_with_mask_history(make: Make, name: str) -> None:
    tokenizer = make(FAMILIES[name])
    assert trained_of(tokenizer, FULL, mask_history=True) == between(FAMILIES[name].full)[1:]


def test_mask_history_refuses_a_row_whose_last_answer_is_not_to_be_trained(make: Make) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d", trained=False))
    with pytest.raises(BadRow, match="marks it as not to be trained"):
        trained_of(make(CHATML), Row(1, 1, Chat(turns)), mask_history=True)
    assert trained_of(make(CHATML), Row(1, 1, Chat(turns))) == ["b<|im_end|>"]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Say how the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}}
WRITTEN_CALL = '{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}'


def tool_chat(*, said: str = "", tools: Sequence[dict[str, object]] = (WEATHER,), calls: Sequence[dict[str, object]] = (CALL,)) -> Row:
    turns = (
        Turn("user", "Weather?"),
        Turn("assistant", said, tool_calls=tuple(calls)),
        Turn("tool", '{"sky": "grey"}', name="get_weather", tool_call_id="abcdefghi"),
        Turn("assistant", "Grey."),
    )
    return Row(1, 1, Chat(turns, tools=tuple(tools)))


@pytest.mark.parametrize(
    ("family", "call", "answer"),
    [
        (QWEN25, f"\n<tool_call>\n{WRITTEN_CALL}}}\n</tool_call><|im_end|>", "Grey.<|im_end|>"),
        (QWEN3, f"\n<tool_call>\n{WRITTEN_CALL}}}\n</tool_call><|im_end|>", "Grey.<|im_end|>"),
        (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eom_id|>', "Grey.<|eot_id|>"),
        (MISTRAL_V3, f'[TOOL_CALLS] [{WRITTEN_CALL}, "id": "abcdefghi"}}]</s>', " Grey.</s>"),
    ],
)
def test_tool_calls_are_trained_like_any_answer(make: Make, family: Family, call: str, answer: str) -> None:
    tokenizer = make(family)
    renderer = Renderer(tokenizer)
    tokens = renderer.tokens(tool_chat())
    text = tokenizer.decode(tokens.input_ids)
    found = trained_texts(tokens, tokenizer)
    assert [found[0].lstrip("\n"), found[1]] == [call.lstrip("\n"), answer]
    assert "grey" in text
    assert json.dumps(WEATHER, ensure_ascii=False) in text
    assert trained_of(tokenizer, tool_chat(), mask_history=True) == [answer]


def test_text_beside_a_call_is_trained_with_it_or_the_row_is_refused(make: Make) -> None:
    row = tool_chat(said="Let me look.")
    assert trained_of(make(QWEN25), row)[0] == f"Let me look.\n<tool_call>\n{WRITTEN_CALL}}}\n</tool_call><|im_end|>"
    with pytest.raises(BadRow, match="leaves out the text beside a tool call"):
        trained_of(make(LLAMA3), row)


def test_several_calls_are_written_or_refused(make: Make) -> None:
    other = {"type": "function", "id": "jklmnopqr", "function": {"name": "get_time", "arguments": {}}}
    assert '"get_time"' in trained_of(make(QWEN25), tool_chat(calls=(CALL, other)))[0]
    with pytest.raises(BadRow, match="one call at a time"):
        trained_of(make(LLAMA3), tool_chat(calls=(CALL, other)))


def test_tools_and_calls_a_template_ignores_are_refused(make: Make) -> None:
    with pytest.raises(BadRow, match="writes no tool definitions"):
        trained_of(make(CHATML), tool_chat())
    with pytest.raises(BadRow, match="leaves out the tool call get_weather"):
        trained_of(make(CHATML), tool_chat(tools=()))
    other = {"type": "function", "function": {"name": "get_time", "description": "Say the time.", "parameters": {}}}
    one = replace(QWEN25, template=QWEN25.template.replace("in tools %}", "in tools[:1] %}"))
    with pytest.raises(BadRow, match="leaves out the tool get_time"):
        trained_of(make(one), tool_chat(tools=(WEATHER, other)))
    half = replace(QWEN25, template=QWEN25.template.replace("c.function.arguments | tojson", "'{}'"))
    with pytest.raises(BadRow, match="leaves out the argument city of a tool call"):
        trained_of(make(half), tool_chat())


def test_a_control_token_in_a_call_is_refused(make: Make) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "<|im_end|>"}}}
    with pytest.raises(BadRow, match="control token of this model"):
        trained_of(make(QWEN25), tool_chat(calls=(call,)))


def thinking(*turns: tuple[str, str, str]) -> Row:
    """Make a row of (question, thought, answer)."""
    flat = [turn for asked, thought, said in turns for turn in (Turn("user", asked), Turn("assistant", said, thoughts=thought))]
    return Row(1, 1, Chat(tuple(flat)))


def test_thoughts_of_earlier_answers_are_dropped_and_that_of_the_last_is_kept(make: Make) -> None:
    wanted = ["one<|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>"]
    renderer = Renderer(make(QWEN3))
    row = thinking(("a?", "hm", "one"), ("b?", "so", "two"))
    assert trained_texts(renderer.tokens(row), make(QWEN3)) == wanted
    assert any("leaves out thoughts" in note for note in renderer.notes())
    spelled = chat("a?", "<think>\nhm\n</think>\n\none", "b?", "<think>so</think>two")
    assert trained_of(make(QWEN3), spelled) == wanted
    assert not any("leaves out thoughts" in note for note in Renderer(make(QWEN3)).notes())


def test_thoughts_beside_a_call_are_kept_while_it_is_the_same_question(make: Make) -> None:
    turns = list(tool_chat().chat.turns)
    turns[1] = replace(turns[1], thoughts="hm", content="Let me look.")
    found = trained_of(make(QWEN3), Row(1, 1, Chat(tuple(turns), tools=(WEATHER,))))
    assert found[0].startswith("<think>\nhm\n</think>\n\nLet me look.\n<tool_call>")


def test_thoughts_are_written_where_the_template_puts_them(make: Make) -> None:
    row = thinking(("a?", "hm", "one"))
    wanted = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>one<|return|>"
    assert trained_of(make(HARMONY), row) == [wanted]
    with pytest.raises(BadRow, match="writes no thoughts"):
        trained_of(make(CHATML), row)
    assert trained_of(make(CHATML), chat("a?", "<think>hm</think>one")) == ["<think>hm</think>one<|im_end|>"]


def test_a_template_that_drops_every_thought_trains_the_answers(make: Make) -> None:
    renderer = Renderer(make(DEEPSEEK))
    tokens = renderer.tokens(chat("a?", "<think>\nhm\n</think>\n\none"))
    assert [text.strip() for text in trained_texts(tokens, make(DEEPSEEK))] == ["one<｜end▁of▁sentence｜>"]
    assert any("leaves out thoughts" in note for note in renderer.notes())


@pytest.mark.parametrize("change", ["| upper", "| replace('e', 'E')", "| truncate(3, true, '')", "| replace('e', 'e e')"])
def test_an_answer_that_a_template_changes_is_refused(make: Make, change: str) -> None:
    changed = replace(QWEN3, template=QWEN3.template.replace("{{ text }}", "{{ text " + change + " }}"))
    with pytest.raises(BadRow, match=r"changes the text of a turn|leaves out or changes a turn"):
        trained_of(make(changed), chat("a?", "there is more of it", "b?", "there again"))


def test_generation_markers_and_loop_controls_are_understood(make: Make) -> None:
    marked = replace(
        CHATML,
        template="{% for m in messages %}{% if m.role == 'nobody' %}{% continue %}{% endif %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    )
    assert trained_of(make(marked), FULL) == between(CHATML.full)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_text_is_the_one_transformers_renders(make: Make, name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    theirs = PreTrainedTokenizerFast.from_pretrained(write(tmp_path / "model", family))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " <b> 'Hello' "}]
    if "strftime_now" not in family.template:  # theirs has today's date
        for answer_next in (False, True):
            given = messages[: 1 if answer_next else 2]
            text = theirs.apply_chat_template(given, tokenize=False, add_generation_prompt=answer_next)
            assert make(family).render(given, answer_next=answer_next) == text


def test_a_template_cannot_reach_out_of_its_sandbox(make: Make) -> None:
    hostile = replace(CHATML, template="{{ dict.__class__.__mro__ }}{{ messages[0].content }}")
    with pytest.raises(BadRow, match="the chat template refuses it"):
        trained_of(make(hostile), BARE)


BASE = Family("", ("<s>", "</s>"), "", "", bos="<s>", eos="</s>")
KNOWS = Family("", (*CHATML.specials, "</s>"), "", "", eos="</s>")
PLAIN = Row(1, 1, Chat((Turn("user", "2+2="), Turn("assistant", "4")), plain=True))


def test_without_a_template_chats_get_chatml_only_if_its_tokens_are_there(make: Make) -> None:
    assert trained_of(make(KNOWS), chat("a", "b")) == ["b<|im_end|>"]
    assert "ChatML is used for chats" in make(KNOWS).note
    with pytest.raises(BadRow, match="no chat template"):
        trained_of(make(BASE), chat("a", "b"))


def test_without_a_template_prompt_and_completion_are_plain_text(make: Make) -> None:
    for family in (BASE, KNOWS):
        assert trained_of(make(family), PLAIN) == ["4</s>"]
        assert trained_of(make(family, (("=", "4"),)), PLAIN) == ["4</s>"]


def test_chatml_set_by_hand_is_used_for_everything_and_in_place_of_another_template(make: Make) -> None:
    assert trained_of(make(KNOWS, chat_template="chatml"), PLAIN) == ["4<|im_end|>"]
    tokenizer = make(SMOLLM3, chat_template="chatml")
    assert trained_of(tokenizer, FULL) == between(CHATML.full)
    assert "in place of the model's own" in tokenizer.note
    assert tokenizer.digest() != make(SMOLLM3).digest()


def test_chatml_set_by_hand_needs_its_tokens(make: Make) -> None:
    for family in (BASE, GEMMA2):
        with pytest.raises(ModelError, match="which the model's vocabulary lacks") as raised:
            make(family, chat_template="chatml")
        assert "never trained" in raised.value.problem.hint


@pytest.mark.parametrize("family", [CHATML, ALPACA, BASE])
def test_raw_text_is_trained_from_its_first_token_to_its_end_token(make: Make, family: Family) -> None:
    tokenizer = make(family)
    tokens = Renderer(tokenizer).tokens(Row(1, 1, Chat((Turn("assistant", "A text."),), verbatim="text")))
    assert tokenizer.decode(tokens.input_ids) == "A text." + family.eos
    assert list(tokens.trained) == [0] + [1] * (len(tokens.trained) - 1)


def test_segments_are_encoded_one_by_one_and_nothing_is_added(make: Make) -> None:
    tokenizer = make(OLMO, (("=", "4"),))
    pieces = (Turn("user", "2+2="), Turn("assistant", "4<|endoftext|>"), Turn("user", " 3+3="), Turn("assistant", "6"))
    tokens = Renderer(tokenizer, mask_history=True).tokens(Row(1, 1, Chat(pieces, verbatim="segments")))
    assert tokenizer.decode(tokens.input_ids) == "2+2=4<|endoftext|> 3+3=6"
    assert trained_texts(tokens, tokenizer) == ["4<|endoftext|>", "6"]


def test_token_ids_pass_through_if_they_are_this_models(make: Make) -> None:
    renderer = Renderer(make(CHATML))
    tokens = renderer.tokens(Row(3, 1, Chat((), ids=((5, 6, 7), (1, 0, 1)))))
    assert (tokens.row, list(tokens.input_ids), list(tokens.trained)) == (3, [5, 6, 7], [0, 0, 1])
    for ids in ((5, 6, make(CHATML).vocab_size), (5, -1, 7)):
        with pytest.raises(BadRow, match="none of this model's"):
            renderer.tokens(Row(1, 1, Chat((), ids=(ids, (1, 0, 1)))))
    with pytest.raises(BadRow, match="do not belong together"):
        renderer.tokens(Row(1, 1, Chat((), ids=((5, 6), (1, 0, 1)))))


def test_a_template_that_writes_two_first_tokens_gets_one(make: Make) -> None:
    twice = replace(VICUNA, template="{{ bos_token }}" + VICUNA.template)
    tokens = Renderer(make(twice)).tokens(FULL)
    assert make(twice).decode(tokens.input_ids) == VICUNA.full.replace("«", "").replace("»", "")
    assert trained_texts(tokens, make(twice)) == between(VICUNA.full)


def test_turns_that_the_data_excludes_are_written_and_not_trained(make: Make) -> None:
    for family in (CHATML, QWEN3, LLAMA3):
        turns = (Turn("user", "a"), Turn("assistant", "<think>hm</think>b", trained=False), Turn("user", "c"), Turn("assistant", "d"))
        (found,) = trained_of(make(family), Row(1, 1, Chat(turns)))
        assert found == "d" + between(family.full)[1].partition("Yes.")[2]


def test_the_demo_models_own_template_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine import builtin

    monkeypatch.delenv("QLORA_TUI_HOME")  # where the model lies if somebody fetched it; it is only read
    files = builtin.small_files()
    if not files.complete:
        pytest.skip("the demo model is not on this machine")
    tokenizer = load_tokenizer(files.folder)
    found = trained_of(tokenizer, FULL)
    assert found == between(CHATML.full)
    tokens = Renderer(tokenizer).tokens(BARE)
    assert tokenizer.decode(tokens.input_ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n")


def test_a_tokenizer_that_begins_every_text_with_a_space_is_not_cut(tmp_path: Path) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = ["▁", "=", "4", "2", "+", ":", "=4", "▁4"]
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[("=", "4"), ("▁", "4")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(BadRow, match="begins in the middle of a token"):
        trained_of(tokenizer, PLAIN)
    spaced = Row(1, 1, Chat((Turn("user", "2+2:"), Turn("assistant", " 4")), plain=True))
    assert [text.strip() for text in trained_of(tokenizer, spaced)] == ["4<|endoftext|>"]

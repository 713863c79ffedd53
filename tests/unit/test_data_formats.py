"""Formats: small inputs with the right answer each, and the promise that no row goes missing without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tui.engine.columns import DATA_FIELDS, fault, split
from qlora_tui.engine.data.chat import Chat, Refusal, Row, Turn
from qlora_tui.engine.data.formats import FORMATS, detect
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig

Fields = Mapping[str, object]
LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool": "T"}


def shown(chat: Chat) -> str:
    """Write a chat on one line: `U` asked, `A` answered and trained, `a` answered and not trained."""
    if chat.ids is not None:
        return " ".join(f"{token}*" if trained else str(token) for token, trained in zip(*chat.ids, strict=True))
    extra = f" tools={','.join(str(tool['function']['name']) for tool in chat.tools)}" if chat.tools else ""  # type: ignore[index]
    kind = f"{chat.verbatim or ('plain' if chat.plain else '')}"
    return (f"{kind}> " if kind else "") + " | ".join(map(turn_shown, chat.turns)) + extra


def turn_shown(turn: Turn) -> str:
    letter = LETTERS[turn.role] if turn.trained else LETTERS[turn.role].lower()
    name = f"({turn.name})" if turn.name else ""
    calls = "".join(f" call {json.dumps(call['function'])}" for call in turn.tool_calls)
    thoughts = f" thinking {turn.thoughts}" if turn.thoughts else ""
    return f"{letter}{name} {turn.content}{thoughts}{calls}"


def told(rows: Sequence[Fields], wanted: str = "auto", columns: Sequence[str] = ()) -> tuple[str, str, list[str]]:
    """Return the format, the reason, and a line for every row or refusal: `2 U a | A b` or `3 field: sentence`."""
    form, why = detect(rows, wanted, columns)
    lines = []
    for one in form.read_all((number, number, row) for number, row in enumerate(rows, 1)):
        if isinstance(one, Refusal):
            lines.append(f"{one.row} !{one.field}: {one.reason}")
        else:
            lines.append(f"{one.number} {shown(one.chat)}" + (f" with {','.join(map(str, one.chat.joined))}" if one.chat.joined else ""))
    return form.name, why, lines


def say(*texts: str) -> list[dict[str, object]]:
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def parts(*texts: tuple[str, object]) -> dict[str, object]:
    """Return an answer in parts, each with its train flag; None: without one."""
    return {"role": "assistant", "content": [{"type": "text", "text": text, "train": flag} for text, flag in texts]}


def gpt(*texts: str) -> list[dict[str, object]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


CALL = '{"name": "add", "arguments": {"x": 1.10, "y": 2}}'
CALLED = 'call {"name": "add", "arguments": {"x": 1.1, "y": 2}}'
TOOL = {"name": "add", "parameters": {"type": "object"}}

GOOD: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "messages": ([{"messages": say("a", "b", "c", "d")}], "messages", ["1 U a | A b | U c | A d"]),
    "roles in any case, with spaces": (
        [{"messages": [{"role": " Human ", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]}],
        "messages",
        ["1 U a | A b"],
    ),
    "developer is system": (
        [{"messages": [{"role": "developer", "content": "s"}, *say("a", "b")]}],
        "messages",
        ["1 S s | U a | A b"],
    ),
    "content as parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, say("", "c")[1]]}],
        "messages",
        ["1 U ab | A c"],
    ),
    "content as one bare part": ([{"messages": [{"role": "user", "content": ["a"]}, say("", "c")[1]]}], "messages", ["1 U a | A c"]),
    "numbers as content": (
        [{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": 1.5}]}],
        "messages",
        ["1 U 7 | A 1.5"],
    ),
    "weight 0": (
        [{"messages": [say("a")[0], {"role": "assistant", "content": "b", "weight": 0}, *say("c", "d")]}],
        "messages",
        ["1 U a | a b | U c | A d"],
    ),
    "parts that all say the same of training": (
        [{"messages": [say("a")[0], parts(("b", False), ("b", False)), *say("c"), parts(("d", True), ("e", True))]}],
        "messages",
        ["1 U a | a bb | U c | A de"],
    ),
    "parts of a question that are not trained, as none is": (
        [{"messages": [{**parts(("a", False)), "role": "user"}, *say("", "b")[1:]]}],
        "messages",
        ["1 U a | A b"],
    ),
    "a turn that is not trained, whatever its parts say": (
        [{"messages": [*say("a"), {**parts(("b", True)), "train": False}, *say("c", "d")]}],
        "messages",
        ["1 U a | a b | U c | A d"],
    ),
    "train as text": (
        [{"messages": [say("a")[0], {"role": "assistant", "content": "b", "train": "False"}, *say("c", "d")]}],
        "messages",
        ["1 U a | a b | U c | A d"],
    ),
    "tool calls with arguments as text, as an API writes them": (
        [
            {
                "messages": [
                    *say("a"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1.10, "y": 2}'}}],
                    },
                    {"role": "tool", "tool_call_id": "1", "name": "add", "content": "3"},
                    say("", "b")[1],
                ],
                "tools": [{"type": "function", "function": TOOL}],
            }
        ],
        "messages",
        [f"1 U a | A  {CALLED} | T(add) 3 | A b tools=add"],
    ),
    "calls without a wrapper, tools as JSON text": (
        [{"messages": [*say("a"), {"role": "assistant", "tool_calls": [json.loads(CALL)]}], "tools": json.dumps([TOOL])}],
        "messages",
        [f"1 U a | A  {CALLED} tools=add"],
    ),
    "the older function_call and functions": (
        [
            {
                "messages": [
                    *say("a"),
                    {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": "{}"}},
                    {"role": "function", "name": "add", "content": ""},
                    say("", "b")[1],
                ],
                "functions": [TOOL],
            }
        ],
        "messages",
        ['1 U a | A  call {"name": "add", "arguments": {}} | T(add)  | A b tools=add'],
    ),
    "thoughts of an answer": (
        [{"messages": [*say("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]}],
        "messages",
        ["1 U a | A b thinking hm"],
    ),
    "fields that Arrow fills with nothing": (
        [
            {
                "messages": [
                    {**turn, "tool_calls": None, "name": None, "weight": None, "reasoning_content": None} for turn in say("a", "b")
                ],
                "tools": None,
                "images": [],
            }
        ],
        "messages",
        ["1 U a | A b"],
    ),
    "a system text beside the messages": ([{"messages": say("a", "b"), "system": "s"}], "messages", ["1 S s | U a | A b"]),
    "the same system text twice": (
        [{"messages": [{"role": "system", "content": "s"}, *say("a", "b")], "system": "s "}],
        "messages",
        ["1 S s  | U a | A b"],
    ),
    "messages as JSON text, as CSV has them": ([{"messages": json.dumps(say("a", "b"))}], "messages", ["1 U a | A b"]),
    "from and value in messages": ([{"messages": gpt("a", "b")}], "messages", ["1 U a | A b"]),
    "the key in capitals": ([{"Messages": say("a", "b")}], "messages", ["1 U a | A b"]),
    "sharegpt": ([{"conversations": gpt("a", "b"), "id": "x"}], "sharegpt", ["1 U a | A b"]),
    "sharegpt with other names for the two": (
        [{"conversations": [{"from": "User", "value": "a"}, {"from": "chatgpt", "value": "b"}]}],
        "sharegpt",
        ["1 U a | A b"],
    ),
    "sharegpt with role and content": ([{"conversations": say("a", "b")}], "sharegpt", ["1 U a | A b"]),
    "one conversation": ([{"conversation": say("a", "b")}], "sharegpt", ["1 U a | A b"]),
    "sharegpt with system and tools": (
        [
            {
                "conversations": [
                    *gpt("a"),
                    {"from": "function_call", "value": CALL},
                    {"from": "observation", "value": 3},
                    gpt("", "b")[1],
                ],
                "system": "s",
                "tools": json.dumps([TOOL]),
            }
        ],
        "sharegpt",
        [f"1 S s | U a | A  {CALLED} | T 3 | A b tools=add"],
    ),
    "several calls in one turn": (
        [{"conversations": [*gpt("a"), {"from": "function_call", "value": f"[{CALL}, {CALL}]"}]}],
        "sharegpt",
        [f"1 U a | A  {CALLED} {CALLED}"],
    ),
    "alpaca": ([{"instruction": "a", "input": "i", "output": "b"}], "alpaca", ["1 U a\n\ni | A b"]),
    "alpaca without input": ([{"instruction": "a", "input": " ", "output": "b"}], "alpaca", ["1 U a | A b"]),
    "alpaca with nothing as input": ([{"instruction": "a", "input": None, "output": 42}], "alpaca", ["1 U a | A 42"]),
    "alpaca with system and history": (
        [{"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]}],
        "alpaca",
        ["1 S s | U q | A r | U a | A b"],
    ),
    "alpaca with its rendered text": ([{"instruction": "a", "output": "b", "text": "### a ### b"}], "alpaca", ["1 U a | A b"]),
    "prompt and completion": ([{"prompt": "a", "completion": " b"}], "prompt-completion", ["1 plain> U a | A  b"]),
    "prompt and completion as lists": (
        [{"prompt": say("x", "y", "a"), "completion": say("", "b")[1:]}],
        "prompt-completion",
        ["1 U x | a y | U a | A b"],
    ),
    "prompt as a list, completion as text": ([{"prompt": say("a"), "completion": "b"}], "prompt-completion", ["1 U a | A b"]),
    "prompt and completion with a system text": (
        [{"prompt": "a", "completion": "b", "system": "s"}],
        "prompt-completion",
        ["1 S s | U a | A b"],
    ),
    "question and answer": ([{"question": "a", "answer": 3}], "question-answer", ["1 U a | A 3"]),
    "question and response": ([{"question": "a", "response": "b"}], "question-answer", ["1 U a | A b"]),
    "instruction, context and response": (
        [{"instruction": "a", "context": "c", "response": "b", "category": "x"}],
        "question-answer",
        ["1 U a\n\nc | A b"],
    ),
    "instruction, input and response": ([{"instruction": "a", "input": "i", "response": "b"}], "question-answer", ["1 U a\n\ni | A b"]),
    "prompt and generation": ([{"prompt": "a", "generation": "b"}], "question-answer", ["1 U a | A b"]),
    "prompt, response and history": (
        [{"prompt": "a", "response": "b", "history": [["q", "r"]]}],
        "question-answer",
        ["1 U q | A r | U a | A b"],
    ),
    "INSTRUCTION and RESPONSE": ([{"INSTRUCTION": "a", "RESPONSE": "b", "SOURCE": "x"}], "question-answer", ["1 U a | A b"]),
    "context, question, answer": ([{"context": "c", "question": "a", "answer": "b"}], "question-answer", ["1 U c\n\na | A b"]),
    "article, question, answer": ([{"article": "c", "question": "a", "answer": "b"}], "question-answer", ["1 U c\n\na | A b"]),
    "system_prompt, question, response": (
        [{"system_prompt": "s", "question": "a", "response": "b", "id": "x"}],
        "question-answer",
        ["1 S s | U a | A b"],
    ),
    "query and response": ([{"query": "a", "response": "b", "original_question": "o"}], "question-answer", ["1 U a | A b"]),
    "problem and solution": ([{"problem": "a", "solution": "b"}], "question-answer", ["1 U a | A b"]),
    "input and output": ([{"input": "a", "output": "b"}], "question-answer", ["1 U a | A b"]),
    "the pair that most rows have filled": (
        [{"question": "a", "answer": None, "response": "b"}, {"question": "c", "answer": None, "response": "d"}],
        "question-answer",
        ["1 U a | A b", "2 U c | A d"],
    ),
    "a chain": (
        [
            {"id": 1, "parent_id": None, "prompt": "a", "answer": "b", "system": "s"},
            {"id": 2, "parent_id": 1.0, "prompt": "c", "answer": "d", "system": "s"},
            {"id": "3", "parent_id": "", "prompt": "e", "answer": "f"},
        ],
        "chained",
        ["2 S s | U a | A b | U c | A d with 1", "3 U e | A f"],
    ),
    "a chain whose parent comes later, with a branch": (
        [
            {"id": "b", "parent_id": "a", "instruction": "c", "output": "d"},
            {"id": "a", "parent_id": None, "instruction": "a", "output": "b"},
            {"id": "c", "parent_id": "a", "instruction": "e", "output": "f"},
        ],
        "chained",
        ["1 U a | A b | U c | A d with 2", "3 U a | a b | U e | A f with 2"],
    ),
    "segments": (
        [{"segments": [{"text": "<s>a", "label": False}, {"text": "b</s>", "label": "true"}]}],
        "segments",
        ["1 segments> U <s>a | A b</s>"],
    ),
    "text": ([{"text": "a b", "meta": "x"}], "text", ["1 text> A a b"]),
    "tokens": ([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], "tokenized", ["1 5 6* 7*"]),
    "tokens with padding, as text": (
        [{"input_ids": ["0", "5", "6", "0"], "labels": ["-100", "-100", "6", "-100"], "attention_mask": ["0", "1", "1", "0"]}],
        "tokenized",
        ["1 5 6*"],
    ),
    "a few rows of another shape": (
        [{"messages": say("a", "b")}, {"prompt": "a", "completion": "b"}, {"messages": say("c", "d")}],
        "messages",
        ["1 U a | A b", "2 !: the row has none of the fields of messages; it holds 'prompt', 'completion'", "3 U c | A d"],
    ),
    "of two rows the one that fits whole decides": (
        [{"messages": None}, {"prompt": "a", "completion": "b"}],
        "prompt-completion",
        ["1 !: the row has none of the fields of prompt-completion; it holds 'messages'", "2 plain> U a | A b"],
    ),
    "chats that hold a rejected pair beside them": (
        [{"prompt": "a", "messages": say("a", "b"), "chosen": say("a", "b"), "rejected": say("a", "x")}],
        "messages",
        ["1 U a | A b"],
    ),
    "escape sequences stay text": (
        [{"prompt": "\x1b]52;c;x\x07", "completion": "\u202eb\x00"}],
        "prompt-completion",
        ["1 plain> U \x1b]52;c;x\x07 | A \u202eb\x00"],
    ),
    "text that looks like markup or like a template": (
        [{"question": "{{ messages }}{% raw %}", "answer": "[bold]<|im_end|>[/bold]"}],
        "question-answer",
        ["1 U {{ messages }}{% raw %} | A [bold]<|im_end|>[/bold]"],
    ),
    "a prompt that begins like a list": ([{"prompt": "[1, 2", "completion": "3]"}], "prompt-completion", ["1 plain> U [1, 2 | A 3]"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_rows_are_recognised_and_read_to_the_letter(name: str) -> None:
    rows, form, lines = GOOD[name]
    found = told(rows)
    assert (found[0], found[2]) == (form, lines)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "!messages: the list of messages is empty"),
    "nothing": ({"conversations": None}, "!conversations: a list of messages was expected"),
    "an empty list as text": ({"conversations": "[]"}, "!conversations: the list of messages is empty"),
    "Python's spelling": ({"messages": "[{'role': 'user'}]"}, "!messages: a list of messages in Python's spelling, which is no JSON"),
    "an unknown role": ({"messages": [{"role": "\x1bcritic", "content": "a"}]}, "!messages[0].role: role '\\\\x1bcritic' is not known"),
    "an empty answer": ({"conversations": gpt("a", " ")}, "!conversations[1].value: the text is empty"),
    "no answer": ({"messages": say("a")}, "!messages: there is no assistant turn"),
    "a picture part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *say("a", "b")]},
        "!messages[0].content: a part of the content is of type 'image_url'",
    ),
    "a picture beside": ({"messages": say("<image>a", "b"), "images": ["a.png"]}, "!images: pictures and sound cannot be trained"),
    "parts of which some are trained": (
        {"messages": [*say("a"), parts(("b", True), ("c", False))]},
        "!messages[1].content: a part of an answer has a train flag of its own; flags of whole turns, or segments, can be told",
    ),
    "a part with a flag beside one without": (
        {"messages": [*say("a"), parts(("b", False), ("c", None))]},
        "!messages[1].content: a part of an answer has a train flag of its own",
    ),
    "parts of a question that are to be trained": (
        {"messages": [{**parts(("a", True)), "role": "user"}, *say("", "b")[1:]]},
        "!messages[0].train: a user turn is marked to be trained",
    ),
    "a part that is half trained": (
        {"messages": [*say("a"), parts(("b", 0.5))]},
        "!messages[1].content: '0.5' is neither true nor false",
    ),
    "train flags for places of the text": (
        {"messages": [*say("a"), {**say("", "b")[1], "train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}]},
        "!messages[1].train_detail: a message has train flags for parts of its text",
    ),
    "a question that is to be trained": (
        {"messages": [{**say("a")[0], "train": True}, say("", "b")[1]]},
        "!messages[0].train: a user turn is marked to be trained",
    ),
    "half a weight": (
        {"messages": [*say("a"), {"role": "assistant", "content": "b", "weight": 0.5}]},
        "!messages[1].weight: '0.5' is neither true nor false",
    ),
    "arguments that are no JSON": (
        {"messages": [*say("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
        "!messages[1].tool_calls[0].arguments: '{x' is not JSON",
    ),
    "arguments that are a list": (
        {"conversations": [*gpt("a"), {"from": "function_call", "value": '{"name": "f", "arguments": [1]}'}]},
        "!conversations[1].value.arguments: arguments must be a JSON object, found a list",
    ),
    "a call in a question": ({"messages": [{**say("a")[0], "tool_calls": [json.loads(CALL)]}, say("", "b")[1]]}, "only an assistant turn"),
    "thoughts in a question": (
        {"messages": [{**say("a")[0], "reasoning_content": "hm"}, say("", "b")[1]]},
        "!messages[0]: only an assistant turn can have thoughts",
    ),
    "a tool without a name": ({"messages": say("a", "b"), "tools": "[{}]"}, "!tools[0]: the tool has no name"),
    "tools that are no list": ({"messages": say("a", "b"), "tools": "{}x"}, "!tools: '{}x' is not JSON"),
    "two system texts": (
        {"messages": [{"role": "system", "content": "s"}, *say("a", "b")], "system": "t"},
        "!messages: the row has two system texts",
    ),
    "an answer that is a list": ({"question": "a", "answer": ["b", "c"]}, "!answer: one text was expected, found a list of 2 texts"),
    "an answer that is an object": ({"question": "a", "answer": {"text": ["b"]}}, "!answer: text was expected, found an object"),
    "an answer that is true": ({"question": "a", "answer": True}, "!answer: text was expected, found true or false"),
    "half a surrogate pair": ({"question": "a", "answer": "\ud83d"}, "!answer: the text holds half of a surrogate pair"),
    "a missing output": ({"instruction": "a"}, "!output: the text is missing"),
    "a missing answer": ({"question": "a"}, "!answer: the text is missing"),
    "a history of threes": ({"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}, "!history[0]: a pair of question"),
    "no segment to train": ({"segments": [{"text": "a", "label": False}]}, "!segments: no piece has a true label"),
    "a segment without label": ({"segments": [{"text": "a"}]}, "!segments[0].label: the label is missing"),
    "an empty text": ({"text": "  "}, "!text: the text is empty"),
    "no labels": ({"input_ids": [1, 2]}, "!labels: labels are missing"),
    "labels that are shifted": ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "!labels[0]: 2 is neither -100 nor its token id 1"),
    "labels of another length": ({"input_ids": [1, 2], "labels": [1]}, "!labels: 1 values for 2 input_ids"),
    "a label on padding": (
        {"input_ids": [1, 2, 0], "labels": [1, 2, 0], "attention_mask": [1, 1, 0]},
        "!labels[2]: padding has a label",
    ),
    "a hole in the mask": (
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "attention_mask": [1, 0, 1]},
        "!attention_mask: only padding at the ends",
    ),
    "ids that are no numbers": ({"input_ids": ["a"], "labels": [-100]}, "!input_ids: 'a' is no whole number"),
    "an id that is out of range": ({"input_ids": [-1, 2], "labels": [-100, 2]}, "!input_ids[0]: -1 is out of range"),
    "a parent that is in no row": ({"id": 1, "parent_id": 9, "prompt": "a", "answer": "b"}, "!parent_id: its parent '9' is in no row"),
    "its own parent": ({"id": 1, "parent_id": 1, "prompt": "a", "answer": "b"}, "!parent_id: it is its own ancestor"),
    "a chained row without id": ({"id": None, "parent_id": None, "prompt": "a", "answer": "b"}, "!id: the id is missing"),
    "a chained row without answer": ({"id": 1, "parent_id": None, "prompt": "a", "answer": ""}, "!answer: the text is empty"),
    "a history beside a parent": (
        {"id": 1, "parent_id": None, "prompt": "a", "answer": "b", "history": [["q", "r"]]},
        "!history: a history beside a parent",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_used_is_refused_with_its_field(name: str) -> None:
    row, sentence = BAD[name]
    _, _, lines = told([row])
    assert len(lines) == 1
    assert sentence in lines[0]


def test_what_hangs_on_a_broken_row_is_refused_by_row() -> None:
    rows: list[Fields] = [
        {"id": 1, "parent_id": None, "prompt": "a", "answer": "b"},
        {"id": 2, "parent_id": 1, "prompt": "c", "answer": ""},
        {"id": 3, "parent_id": 2, "prompt": "e", "answer": "f"},
        {"id": 4, "parent_id": 5, "prompt": "g", "answer": "h"},
        {"id": 5, "parent_id": 4, "prompt": "i", "answer": "j"},
        {"id": 6, "parent_id": 5, "prompt": "k", "answer": "l"},
        {"id": 1, "parent_id": None, "prompt": "m", "answer": "n"},
        {"id": 8, "parent_id": None, "prompt": "o", "answer": "p", "system": "s"},
        {"id": 9, "parent_id": 8, "prompt": "q", "answer": "r", "system": "t"},
    ]
    assert told(rows)[2] == [
        "1 U a | A b",
        "2 !answer: the text is empty",
        "3 !parent_id: row 2, its parent, cannot be used",
        "4 !parent_id: it is its own ancestor: its parents lead back to it",
        "5 !parent_id: it is its own ancestor: its parents lead back to it",
        "6 !parent_id: row 5, its parent, cannot be used",
        "7 !id: '1' is the id of row 1 too",
        "8 S s | U o | A p",
        "9 !system: its system text is another than that of the row which begins the chat",
    ]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "preference rows (chosen, rejected)"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "--set data_columns=completion=chosen"),
        ([{"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}], "--set data_columns=output=chosen"),
        ([{"question": "a", "chosen": "b", "rejected": "c"}], "--set data_columns=answer=chosen"),
        ([{"chosen": say("a", "b"), "rejected": say("a", "c")}], "--set data_columns=messages=chosen"),
        ([{"chosen": "\n\nHuman: a", "rejected": "c"}], 'write them as {"prompt": ..., "completion": ...}'),
        ([{"conversations": gpt("a"), "chosen": gpt("", "b")[1], "rejected": gpt("", "c")[1]}], "add each chosen answer to its chat"),
        ([{"prompt": "a", "completion": "b", "label": True}], "rated answers (prompt, completion, label)"),
        ([{"prompt": "a", "completion": "b", "kto_tag": False}], "rated answers"),
        ([{"text": "a", "role": "prompter", "parent_id": None, "message_id": "1"}], "single turns (role, text, parent_id)"),
        ([{"context": "a"}], "no known format fits: the rows hold the keys 'context'"),
        ([{"body": "a", "label": 1}], "data_columns names columns"),
        ([{}], "the rows hold no keys"),
        ([{"\x1b]52;c;x\x07": 1}], "\\\\x1b]52;c;x\\\\x07"),
        ([{"mesages": say("a", "b")}], "did you mean messages?"),
    ],
)
def test_rows_of_no_use_are_refused_with_what_to_do(rows: Sequence[Fields], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        detect(rows)
    assert sentence in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_what_is_advised_for_preference_rows_works() -> None:
    pairs: list[Fields] = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    name, why, lines = told(pairs, columns=("completion=chosen",))
    assert (name, lines) == ("prompt-completion", ["1 plain> U a | A b"])
    assert why.endswith("not read: rejected")
    assert told([{"chosen": say("a", "b"), "rejected": say("a", "c")}], columns=("messages=chosen",))[2] == ["1 U a | A b"]
    rows: list[Fields] = [{"instruction": "a", "input": "i", "chosen": "b", "rejected": "c"}]
    assert told(rows, columns=("output=chosen",))[2] == ["1 U a\n\ni | A b"]


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([{"messages": say("a", "b")}] * 2, "messages: 2 of the 2 rows looked at fit"),
        (
            [{"messages": say("a", "b"), "prompt": "a", "completion": "b"}],
            "prompt-completion would fit too: --set data_format=NAME chooses",
        ),
        ([{"messages": say("a", "b")}, {"prompt": "a", "completion": "b"}], "messages: 1 of the 2 rows looked at fit; prompt-completion"),
        ([{"instruction": "a", "output": "b", "text": "c"}], "text would fit too"),
        ([{"text": "a", "label": "x"}], "every word of a text is trained; not read: label"),
        ([{"problem": "a", "solution": "b", "answer": "c"}], "the answer is answer and not solution (--set data_columns=answer=solution"),
        ([{"question": "a", "answer": "b", "x": "", "y": None, "\x1bz": 1}], "not read: \\x1bz"),
        ([{"question": "a", "answer": "b", **{f"c{n}": n for n in range(1, 9)}}], "not read: c1, c2, c3, c4, c5, c6 and 2 more"),
    ],
)
def test_the_reason_says_what_was_found_and_what_else_would_do(rows: Sequence[Fields], part: str) -> None:
    _, why, _ = told(rows)
    assert part in why
    assert "\x1b" not in why


@pytest.mark.parametrize(
    ("row", "columns", "line"),
    [
        ({"q": "a", "r": "b"}, ("prompt=q", "completion=r"), "1 plain> U a | A b"),
        ({"My Question": "a", "r": "b", "answer": "x"}, ("question=my question", "answer=r"), "1 U a | A b"),
        ({"problem": "a", "solution": "b", "answer": "c"}, ("answer=solution",), "1 U a | A b"),
        ({"question": "a", "answer": "b", "query": "c"}, ("question=query",), "1 U c | A b"),
        ({"instruction": "a", "output": "b", "best": "c"}, ("answer=best",), "1 U a | A c"),
        ({"body": "a", "prompt": "p", "completion": "c"}, ("text=body",), "1 text> A a"),
        (
            {"dialog": [{"who": "Human", "said": "a"}, {"who": "bot", "said": "b"}]},
            ("messages=dialog", "role=who", "content=said"),
            "1 U a | A b",
        ),
        ({"a=b": "x", "r": "y"}, ("question=a=b", "answer=r"), "1 U x | A y"),
        ({"q": "", "r": "b"}, ("question=q", "answer=r"), "1 !q: the text is empty"),
        ({"dialog": [{"role": "user", "content": ""}]}, ("messages=dialog",), "1 !dialog[0].content: the text is empty"),
        (
            {"n": 1, "up": 1, "q": "a", "r": "b"},
            ("id=n", "parent_id=up", "question=q", "answer=r"),
            "1 !up: it is its own ancestor: its parents lead back to it",
        ),
    ],
)
def test_columns_that_a_person_names_are_read_and_named_in_faults(row: Fields, columns: Sequence[str], line: str) -> None:
    assert told([row], columns=columns)[2] == [line]


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (("prompt",), "'prompt' is not FIELD=COLUMN"),
        (("prompt=",), "is not FIELD=COLUMN"),
        (("=x",), "is not FIELD=COLUMN"),
        (("promt=x",), "'promt' is no field; fields are messages, conversations"),
        (("prompt=a", "prompt=b"), "prompt is given two columns, 'a' and 'b'"),
        (("prompt=a", "completion=a"), "the column 'a' is given to two fields, prompt and completion"),
    ],
)
def test_a_wrong_mapping_is_told_before_anything_is_read(entries: tuple[str, ...], sentence: str) -> None:
    run = RunConfig(model_name_or_path="m", data=("x",), data_columns=entries)
    assert [sentence in problem.message for problem in problems(run) if problem.where == "data_columns"] == [True]
    with pytest.raises(DataError) as caught:
        detect([{"a": "b"}], columns=entries)
    assert sentence in str(caught.value)


def test_the_reason_names_columns_as_the_file_does() -> None:
    rows: list[Fields] = [{"my q": "a", "\x1b[1m": "b"}]
    assert "the question is my q, the answer is \\x1b[1m" in told(rows, columns=("question=my q", "answer=\x1b[1m"))[1]


def test_good_mappings_are_not_complained_about() -> None:
    assert fault(tuple(f"{field}=column {place}" for place, field in enumerate(DATA_FIELDS))) == ""
    assert split(" Parent-ID = up ") == ("parent_id", "up")


@pytest.mark.parametrize(
    ("wanted", "columns", "sentence"),
    [
        (
            "auto",
            ("prompt=nowhere",),
            "reads prompt from the column 'nowhere', which none of the rows looked at has; they hold the keys 'q'",
        ),
        ("alpaca", ("question=q",), "data_columns names question, which alpaca does not read; it reads instruction, input, output"),
        ("auto", ("segments=q", "answer=r"), "belong to no one format"),
        ("alpacca", (), "no data format is called 'alpacca'; known are messages, sharegpt"),
    ],
)
def test_a_mapping_or_a_name_without_effect_is_refused(wanted: str, columns: Sequence[str], sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        detect([{"q": "a", "r": "b"}], wanted, columns)
    assert sentence in str(caught.value)


def test_every_field_that_can_be_mapped_is_read_by_a_format() -> None:
    read = {name for form in FORMATS for name in form.reads} | {"role", "content", "source_id"}
    assert set(DATA_FIELDS) <= read


def test_a_format_that_is_named_is_obeyed() -> None:
    row = {"messages": say("a", "b"), "text": "c", "prompt": "p", "chosen": "x", "rejected": "y"}
    name, why, lines = told([row], "text")
    assert (name, lines) == ("text", ["1 text> A c"])
    assert why.startswith("text, as data_format says; no chat")


def test_a_conversation_keeps_its_own_id_for_grouping() -> None:
    for key in ("conversation_id", "source_id", "Thread-ID"):
        form, _ = detect([{"messages": say("a", "b"), key: 7}])
        assert form.read({"messages": say("a", "b"), key: 7}).source_id == "7"
    form, _ = detect([{"messages": say("a", "b"), "doc": "d"}], columns=("source_id=doc",))
    assert form.read({"messages": say("a", "b"), "doc": "d"}).source_id == "d"


def test_a_long_chain_is_one_chat_and_a_deep_one_costs_no_stack() -> None:
    rows: list[Fields] = [{"id": n, "parent_id": n - 1 if n else None, "prompt": f"q{n}", "answer": f"a{n}"} for n in range(3000)]
    form, _ = detect(rows[:64])
    found = list(form.read_all((n + 1, n + 1, row) for n, row in enumerate(rows)))
    assert len(found) == 1
    assert isinstance(found[0], Row)
    assert [turn.content for turn in found[0].chat.turns] == [text for n in range(3000) for text in (f"q{n}", f"a{n}")]
    assert found[0].chat.joined == tuple(range(1, 3000))


NAMES = [
    "messages", "conversations", "instruction", "input", "output", "history", "system", "prompt", "completion", "question", "answer",
    "response", "context", "text", "segments", "input_ids", "labels", "attention_mask", "id", "parent_id", "chosen", "tools", "images",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "assistant", "[]", "{}"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "label", "tool_calls", "name", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": LEAVES}), min_size=1, max_size=3
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES | TURNS, max_size=6), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, wanted=st.sampled_from(["auto", *(form.name for form in FORMATS)]))
def test_no_row_is_ever_lost_without_a_refusal(rows: list[dict[str, object]], wanted: str) -> None:
    try:
        form, why = detect(rows, wanted)
    except DataError:
        return  # no row was read, and the sentence says why: a run does not begin
    assert why
    found = list(form.read_all((number, None, row) for number, row in enumerate(rows, 1)))
    used = {number for one in found if isinstance(one, Row) for number in (one.number, *one.chat.joined)}
    refused = [one.row for one in found if isinstance(one, Refusal)]
    assert len(refused) == len(set(refused))
    assert used.isdisjoint(refused)
    assert used | set(refused) == set(range(1, len(rows) + 1))
    assert all(one.reason for one in found if isinstance(one, Refusal))
    for one in found:
        if isinstance(one, Row):
            trained = any(turn.role == "assistant" and turn.trained for turn in one.chat.turns)
            assert trained or (one.chat.ids and any(one.chat.ids[1]))


@settings(max_examples=200, deadline=None)
@given(parents=st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=10))
def test_every_answer_of_a_chained_file_is_trained_once_or_its_row_is_refused(parents: list[int | None]) -> None:
    rows = [{"id": n, "parent_id": parent, "prompt": f"q{n}", "answer": f"a{n}"} for n, parent in enumerate(parents)]
    form, _ = detect(rows, "chained")
    trained, refused = [], []
    for one in form.read_all((n, None, row) for n, row in enumerate(rows)):
        if isinstance(one, Row):
            trained += [int(turn.content[1:]) for turn in one.chat.turns if turn.role == "assistant" and turn.trained]
        else:
            refused.append(one.row)
    assert sorted(trained + refused) == list(range(len(rows)))

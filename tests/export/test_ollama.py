"""Chat templates in Ollama's language: every family of ours is written and says the same; what cannot be said is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from chat_families import CHATML, FAMILIES, Family
from tests.unit.test_data_templates import write

from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.export.gorender import render
from qlora_tui.engine.export.gotemplate import probes, translate, without_bos
from qlora_tui.engine.export.ollama import modelfile
from qlora_tui.engine.export.serving import prompt_text

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Sure?"},
]


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_in_ollamas_language(tmp_path: Path, name: str, adds_bos: bool) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", FAMILIES[name]))
    written = translate(tokenizer, adds_bos=adds_bos)
    for messages in [*probes(), MESSAGES, MESSAGES[1:]]:
        expected = prompt_text(tokenizer, messages)
        assert expected is not None
        assert render(written, messages) == without_bos(expected, tokenizer, adds_bos=adds_bos)


def refused(tmp_path: Path, family: Family) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", family))
    with pytest.raises(ModelError, match="does more than Ollama's language is known here to say; export gguf"):
        translate(tokenizer, adds_bos=False)


@pytest.mark.parametrize(
    "body",
    [
        "{{ loop.index }}{{ m.content }}",  # numbers its turns
        "{{ m.content | upper }}",  # changes them
        "{% if m.role == 'user' %}{{ m.content }}{% endif %}",  # leaves some out
        "{{ m.content if loop.last else m.content[:20] }}",  # shortens them
    ],
)
def test_a_template_that_does_more_is_refused(tmp_path: Path, body: str) -> None:
    refused(tmp_path, dataclasses.replace(CHATML, template="{% for m in messages %}" + body + "{% endfor %}"))


def test_a_template_that_writes_otherwise_after_many_turns_is_refused(tmp_path: Path) -> None:
    template = CHATML.template.replace("m.content +", "m.content + ('!' if messages | length > 4 else '') +")
    refused(tmp_path, dataclasses.replace(CHATML, template=template))


def test_braces_in_a_template_stand_for_themselves(tmp_path: Path) -> None:
    template = CHATML.template.replace("'<|im_start|>'", "'{{ {' + '% %}<|im_start|>'")
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", dataclasses.replace(CHATML, template=template)))
    assert render(translate(tokenizer, adds_bos=False), MESSAGES) == prompt_text(tokenizer, MESSAGES)


def test_a_model_without_a_template_is_asked_the_bare_question(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", dataclasses.replace(CHATML, template="", specials=("</s>",), eos="</s>")))
    assert translate(tokenizer, adds_bos=False) == "{{ .Prompt }}"
    assert render("{{ .Prompt }}", MESSAGES) == "Sure?"


# What Go's own text/template (1.27) makes of these was looked at; the texts on the right are its answers


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {{- 'x' }}", None),
        ('{{ .System }}|{{ len .Messages }}|{{ "a{{b\\n" }}', "Be brief.|4|a{{b\n"),
        ("{{/* nothing */}}a {{- .Prompt -}} b", "aSure?b"),
        ("{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }} {{ end }}", "0system 1user 2assistant 3user "),
        ('{{ range .Messages }}{{ if eq .Role "user" "system" }}+{{ else if ne .Role "tool" }}-{{ else }}0{{ end }}{{ end }}', "++-+"),
        ("{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}last {{ .Content }}{{ end }}{{ end }}", "last Sure?"),
        ("{{ if and .System (not .Response) }}yes{{ else }}no{{ end }}{{ if or .Response .Prompt }}!{{ end }}", "yes!"),
        ("{{ if .Response }}{{ range .Messages }}{{ if .Role }}x{{ else }}y{{ end }}{{ end }}{{ else }}z{{ end }}", "z"),
        ("{{ with .System }}{{ . }}{{ end }}", None),
        ("{{ .Suffix }}", None),
        ("{{ eq .Prompt }} {{ gt 1 2 }}", None),
    ],
)
def test_gos_language_is_rendered_as_go_does_or_refused(template: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(ModelError, match="only Ollama itself could tell"):
            render(template, MESSAGES)
    else:
        assert render(template, MESSAGES) == expected


def test_a_modelfile_holds_file_template_and_stops() -> None:
    assert modelfile("a.gguf", "x\n", ["<|im_end|>"]) == 'FROM ./a.gguf\nTEMPLATE """x\n"""\nPARAMETER stop "<|im_end|>"\n'
    with pytest.raises(ModelError, match="three quotes"):
        modelfile("a.gguf", 'x"""', [])

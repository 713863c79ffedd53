"""Text that wants to be more than text: what data, models, file names and errors may hold, and a reader of raw terminal bytes."""

from __future__ import annotations

import dataclasses
import re
import unicodedata

from canned_run import middle, opening

from qlora_tui.engine import events as ev
from qlora_tui.engine.spec import RunConfig

FIRST, LAST = "Alpha", "Omega"

ATTACKS: dict[str, str] = {
    "colour": "\x1b[31mred\x1b[0m",
    "clear the screen": "\x1b[2J\x1b[3J\x1b[H",
    "hide the cursor": "\x1b[?25l\x1b[?1049l\x1b[?1003h",
    "retitle": "\x1b]0;pwned\x07\x1b]2;pwned\x1b\\",
    "write the clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "read the clipboard": "\x1b]52;c;?\x07",
    "link": "\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "notify": "\x1b]9;pwned\x07\x1b]777;notify;a;b\x07",
    "image": "\x1b]1337;File=inline=1:AAAA\x07\x1b_Gf=100;AAAA\x1b\\",
    "device string": '\x1bP$q"p\x1b\\\x1bP+q544e\x1b\\',
    "privacy message and the rest": "\x1b^secret\x1b\\\x1bXstart\x1b\\",
    "ask for a reply": "\x1b[c\x1b[6n\x1b[>q\x1b[21t\x05",
    "what a terminal would reply": "\x1b[24;80R\x1b[?1;2c\x1b[200~rm -rf ~\x1b[201~",
    "leave the paste": "\x1b[201~\nrm -rf ~\n",
    "reset": "\x1bc\x1b(0lqqk\x1b(B\x0e\x0f",
    "C1 as characters": "\x9b31m\x9d0;pwned\x9c\x90q\x9c\x85\x84",
    "C1 as UTF-8 gone wrong": "\udc9b31m\udc9d0;x\udc9c",
    "C0": "".join(map(chr, (*range(1, 9), 11, 12, *range(14, 27), *range(28, 32), 127))),
    "nothing": "\x00\x00",
    "carriage return": "100 %\rDONE",
    "back over it": "secret\x08\x08\x08\x08\x08\x08public",
    "a line of its own": "x\nFORGED line\r\nFORGED again\u2028FORGED third\u0085FORGED fourth",
    "bidi": "\u202e\u2066gpj.exe\u2069\u202c\u200f\u200e\u061c",
    "no width": "pass\u200bword\u2060\ufeff\u00ad\u180e",
    "tags and fillers": "\U000e0041\U000e007f\ufff9\ufffb",
    "lone surrogates": "\ud800\udfff",
    "private and unassigned": "\ue000\U000f0000\uffff\U0010ffff",
    "many marks": "e" + "\u0301" * 500 + "o" + "\u20dd" * 300,
    "many joiners": "a" + "\u200d" * 500 + "b",
    "bold": "[bold]x[/bold]",
    "click": "[@click=app.quit]x[/]",
    "click with brackets": "[@click=app.bell('[')]x[/@click]",
    "link in markup": "[link=http://evil.example]x[/link]",
    "unbalanced": "[/] [/b] [b [ ] ]] [[ [#] [a=",
    "backslashes": "\\[ \\\\[ \\[/] \\",
    "style names": "[$error]x[/$error] [on red]x[/on red] [red on #fff]",
    "percent and braces": "%s %(x)d {0} {x!r} {",
    "rich emoji": ":warning: :skull:",
    "html": "<script>alert(1)</script> &amp; | a | `b` | ![x](http://evil.example/x.png)",
    "wide": "漢字" * 40 + "👩‍👩‍👧‍👦",
    "very long": "x" * 30_000,
}
"""By what each tries; none may reach a terminal as it is."""


def dressed(attack: str) -> str:
    """Return an attack between two words, which must stay readable."""
    return f"{FIRST} {attack} {LAST}"


_OURS = re.compile(
    rb"\x1b\[[0-9;]*m"  # colours
    rb"|\x1b\[[0-9]+;[0-9]+H"  # where the next cells go
    rb"|\x1b\[[0-9]*[ABCDGJK]|\x1b\[H"  # cursor and clearing, as Textual's driver does
    rb"|\x1b\[\?(?:7|25|1000|1003|1004|1006|1015|1016|1049|2004|2026|2048|2031)[hl]"  # the modes it uses
    rb"|\x1b\[\?(?:2026|2048)\$p"  # and the two that it asks for
    rb"|\x1b\[[<>=][0-9]*u"  # keys that can be told apart
    rb"|\x1b\[(?:22|23);?[0-9]*t"  # the window's title, kept and given back
)
_MEANT = re.compile(rb"\x1b\](?:22|52;c|0|2);([^\x07\x1b]*)(?:\x07|\x1b\\)")  # a pointer, a copy or a title of ours: only its text is left
_MARKS = re.compile(r"[\u0300-\u036f\u20d0-\u20ff]{9}|\u200d{9}")


def stripped(seen: bytes) -> str:
    """Return what is left of raw terminal bytes without the sequences that the screens themselves use."""
    return _OURS.sub(b"", _MEANT.sub(rb"\1", seen)).decode("utf-8")


def bad_characters(text: str) -> set[str]:
    """Return every character of `text` that a terminal would obey, hide or reorder, and any flood of marks."""
    found = {repr(char) for char in text if char not in "\n\r\t\u200d" and unicodedata.category(char) in HIDDEN}
    return found | {f"a flood of {flood.group()[0]!r}" for flood in _MARKS.finditer(text)}


HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def told(text: str) -> list[ev.Event]:
    """Return a run that holds `text` in every field that can hold one."""
    run = RunConfig(model_name_or_path=text, data=(text,), eval_data=text)
    first, *rest = opening(run)
    assert isinstance(first, ev.Started)
    device = {"name": text, "kind": text, "total_bytes": 1 << 34}
    events: list[ev.Event] = [dataclasses.replace(first, run_id=text, device=device, versions={text: text}), *rest, *middle()]
    events += [ev.Phase(name, "begin", 1, 2, text, note=text) for name in ("load", text)]  # type: ignore[arg-type]  # as a journal may hold
    events += [ev.Prepared(text, text, 1, 1, 1, 1, 1, 1, 40, {text: 1}, {text: 2}, notes=(text,))]
    budget = {"total_bytes": 5, "items": [{"name": text, "bytes": 5, "how": text}], "device": {"name": text, "total_bytes": 9}}
    events += [ev.Planned(budget, {text: text}, text), ev.Device(1, 1, 2, throttle=text), ev.Command(text, text, False, text)]
    events += [ev.Finding(text, "warn", 9, text, (text, text), {text: text}), ev.RolledBack(9, 0.5, 1, text)]
    events += [ev.Sampled(9, text, text)]
    worst = ({"row": 3, "base_loss": 1.0, "loss": 2.0, "prompt": text, "answer": text}, {"row": text, "loss": text})
    events += [ev.Evaluated(40, 1.0, 9, 0.1, text, base_loss=2.0, drop=1.0, verdict=text, worst=worst), ev.Saved(40, text, 1, "adapter")]
    events += [ev.Probed(40, name, text, 9, 90, 1.0, 2.0, -1.0, (-2.0, 0.0), 0.1) for name in ("general", text)]  # type: ignore[arg-type]
    events += [ev.Probed(40, "other_question", text, 9, 90, 1.0, 2.0, -1.0, (-2.0, 0.0), 0.1, 0.2, (0.1, 0.3))]
    return events

"""Every key of every screen, in one table: keys, footer, help and palette are made from it, so that they cannot disagree.

To add a key: one line in the table of its place, and a method `action_NAME` there. What cannot be done now is told by
the screen's `check_action`; footer, help and palette leave it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Action:
    """Something that can be done on a screen.

    Attributes:
        name: what the user's own keys call it; the same name in two places means the same.
        keys: Textual's names of the keys, commas between them; none means that only the palette offers it.
        label: one or two words for the footer; without them it is neither in the footer nor in help nor in the palette.
        sentence: what it does, for help and palette; the label where there is no more to say.
        does: Textual's action with its arguments; the name where it is empty.
        written: how the key is written, where its name does not do.
        footer: whether the footer shows it; what does not fit there is left out from the end of the table.
        always: whether the footer keeps it however narrow the screen is.
        least: whether the footer leaves it out first: what the screen shows by itself.
        first: whether it goes before what a focused widget does with the key.
        palette: whether the palette offers it; what moves a cursor is no use there.
    """

    name: str
    keys: str
    label: str = ""
    sentence: str = ""
    does: str = ""
    written: str = ""
    footer: bool = True
    always: bool = False
    least: bool = False
    first: bool = False
    palette: bool = True

    @property
    def call(self) -> str:
        """Return Textual's action."""
        return self.does or self.name

    @property
    def words(self) -> str:
        """Return what it does, as long as it was told."""
        return self.sentence or self.label


def _hidden(name: str, keys: str, does: str) -> Action:
    return Action(name, keys, does=does, footer=False, palette=False)


_HELP = Action("help", "question_mark", "help", "show the keys", written="?", always=True)
_BACK = "escape"

PLACES: Mapping[str, tuple[Action, ...]] = {
    "app": (
        Action("interrupt", "ctrl+c", first=True, footer=False, palette=False),
        Action("leave", "ctrl+q", "quit", "leave, also while you type", first=True, footer=False, palette=False),
        Action("theme", "", "theme", "dark or light: the other one, also the next time", footer=False),
        Action("palette", "colon,ctrl+p", "all keys", "find what can be done here by its words", written=":", footer=False, palette=False),
    ),
    "run": (
        Action("stop", "s", "stop", "stop: choose how"),
        Action("detach", "d", "leave running", "close the screen; training goes on"),
        Action("pause", "p", "pause", "pause: save and free the device for other programs; again: go on"),
        Action("sample", "a", "sample", "show what the model answers now"),
        Action("slower", "l", "lr", "half the learning rate (l), or double it (L)", written="l L"),
        _hidden("faster", "L", "faster"),
        Action("save", "k", "save", "save a checkpoint at the next safe point"),
        Action("zoom", "z", "zoom", "make one panel fill the screen, or back"),
        Action("log-scale", "y", "log scale", "logarithmic loss axis, or back", does="log_y"),
        Action("find", "slash", "find", "look for words in the log; n and N go on", written="/"),
        Action("copy", "c", "copy", "copy what the chosen panel says; a file gets it too"),
        _HELP,
        Action("quit", "q", "quit", "leave; asks first while the run is training", does="leave", always=True),
        Action("x-axis", "x", "x axis", "let the x axis of the loss count steps, tokens or time", does="counts", footer=False),
        Action("smoothing", "w", "smoothing", "smooth the loss by 0, 0.6, 0.9 or 0.99", does="weight", footer=False),
        Action("outliers", "o", "outliers", "show every loss, also those cut off, or back", does="everything", footer=False),
        Action("cross", "left", "crosshair", "a crosshair on the loss; with shift or ctrl faster", "cross(-1)", "←→", False, palette=False),
        _hidden("cross-right", "right", "cross(1)"),
        _hidden("cross-far-left", "shift+left,ctrl+left", "cross(-10)"),
        _hidden("cross-far-right", "shift+right,ctrl+right", "cross(10)"),
        Action("closer", "plus,equals_sign", "closer", "fewer steps in the plot, more, all", "nearer(0.5)", "+ - 0", footer=False),
        _hidden("wider", "minus", "nearer(2.0)"),
        _hidden("all-steps", "0", "nearer(0.0)"),
        _hidden("older-match", "n", "match(1)"),
        _hidden("newer-match", "N", "match(-1)"),
        Action("panel-1", "1", "panel", "show one panel alone, or back", does="panel(0)", written="1-6", footer=False, palette=False),
        *(_hidden(f"panel-{number}", str(number), f"panel({number - 1})") for number in range(2, 7)),
        Action("back", _BACK, "back", "one level back", written="esc", footer=False, palette=False),
        Action("up", "up,j", "scroll", "scroll a panel that fills the screen", "scroll(1)", "↑↓", footer=False, palette=False),
        _hidden("down", "down", "scroll(-1)"),
        _hidden("page-up", "pageup", "scroll(10)"),
        _hidden("page-down", "pagedown", "scroll(-10)"),
        _hidden("first", "home,g", "scroll(100000)"),
        _hidden("last", "end,G", "scroll(-100000)"),
    ),
    "wizard": (
        Action("next", "enter", "go on", "go on; on the last page: start the run", written="enter", first=True),
        Action("previous", _BACK, "back", "one page back; nothing is lost", written="esc"),
        Action("fixes", "f", "tips", "what to change so that it fits or is faster, with its cost"),
        Action("undo", "u", "undo", "take the last change back"),
        Action("more", "m", "more", "show or hide the settings that are rarely changed", footer=False),
        Action("probe", "t", "test run", "train on 50 rows to measure the speed; again: stop it"),
        Action("queue", "e", "queue", "put the run into the queue instead of starting it", footer=False),
        Action("copy", "c", "copy command", "copy the command; a file gets it too"),
        _HELP,
        Action("text-help", "f1", "help", "help, also while you type", does="text_help", written="F1", always=True, palette=False),
        Action("quit", "q", "quit", "leave; what is unfinished is offered the next time", does="app.leave", always=True),
    ),
    "goal page": (
        Action("up", "up,down", "choose", "choose; the memory bar shows what each needs", "nothing", "↑↓", footer=False, palette=False),
    ),
    "go page": (Action("up", "up,down", "scroll", "scroll the plan", "nothing", "↑↓", footer=False, palette=False),),
    "model page": (
        Action("up", "up", "pick", "pick from the list; the memory bar shows what each needs", "move(-1)", "↑↓", palette=False),
        _hidden("down", "down", "move(1)"),
        Action("complete", "tab", "complete", "complete the path", footer=False, palette=False),
        _hidden("page-up", "pageup", "move(-8)"),
        _hidden("page-down", "pagedown", "move(8)"),
    ),
    "data page": (
        Action("skip-bad", "ctrl+o", "skip bad", "go on without broken rows, or take that back", "skip_bad"),
        Action("complete", "tab", "complete", "complete the path", footer=False, palette=False),
        Action("rows", "f2", "rows", "see the rows as they will be trained", written="F2"),
        Action("triage", "f3", "triage", "find answers that the base already knows", written="F3"),
        Action("page-up", "pageup", "scroll", "scroll up", "scroll(-1)", footer=False, palette=False),
        Action("page-down", "pagedown", "scroll", "scroll down", "scroll(1)", footer=False, palette=False),
        Action("too-long", "f4", "long", "drop rows that are too long, cut or split them", "too_long", "F4"),
        Action("copies", "f5", "copies", "leave out exact copies of earlier rows, also near ones, or none", written="F5"),
    ),
    "field": (
        Action("up", "up", "field", "go to another field", "app.focus_previous", "↑↓", least=True, palette=False),
        _hidden("down", "down", "app.focus_next"),
        Action(
            "left",
            "left",
            "change",
            "the next usual value; or type one",
            "step(-1)",
            "←→",
            least=True,
            palette=False,
        ),
        _hidden("right", "right", "step(1)"),
    ),
    "rows": (
        Action("previous-row", "left,h", "previous row", does="go(-1)", written="←"),
        Action("next-row", "right,l", "next row", does="go(1)", written="→"),
        Action("page-up", "pageup", "ten back", does="go(-10)", written="pgup"),
        Action("page-down", "pagedown", "ten on", does="go(10)", written="pgdn"),
        Action("up", "up,k", "scroll", does="scroll(-1)", written="↑↓", palette=False),
        _hidden("down", "down,j", "scroll(1)"),
        Action("first", "home,g", "first row", does="end(0)", footer=False),
        Action("last", "end,G", "last row", does="end(1)", footer=False),
        Action("close", "escape,f2,q,enter", "back", does="dismiss", written="esc", always=True, palette=False),
    ),
    "triage": (
        Action("score", "s", "score", "let the base score the answers; again: stop it"),
        Action("switch", "space", "on/off", "leave out what is under the threshold, or nothing", written="space"),
        Action("left", "left,h", "threshold", "lower or raise the threshold", "threshold(-1)", "←→", palette=False),
        _hidden("right", "right,l", "threshold(1)"),
        Action("all", "a", "allow all", "let all under the threshold go, not a fifth of the rows at most"),
        _hidden("up", "up,k", "scroll(-1)"),
        _hidden("down", "down,j", "scroll(1)"),
        Action("close", "escape,f3,q,enter", "back", does="dismiss", written="esc", always=True, palette=False),
    ),
    "side by side": (
        Action("left-better", "left,h,1", "left", "the left answer is better", does="prefer(0)", written="←"),
        Action("right-better", "right,l,2", "right", "the right answer is better", does="prefer(1)", written="→"),
        Action("tie", "t,0", "tie", "neither is better", does="say('tie')"),
        Action("skip", "s", "skip", "leave this pair out", does="say('skip')"),
        Action("next-pair", "n", "next", "look at the pair after", does="go(1)"),
        Action("undo", "u,backspace", "undo", "take the last judgement back"),
        Action("reveal", "r", "reveal", "show which is which; a pair that is not judged yet is then left out"),
        Action("whole", "o", "prompt", "show the whole prompt, or its beginning"),
        _HELP,
        Action("close", "escape,q", "leave", "leave; what was judged is kept", does="app.leave", written="q", always=True),
        Action("previous-pair", "p", "look back", "look at the pair before", does="go(-1)", footer=False),
        Action("up", "up,k", "scroll", "scroll long answers", "scroll(-1)", "↑↓", footer=False, palette=False),
        _hidden("down", "down,j", "scroll(1)"),
        _hidden("page-up", "pageup", "scroll(-10)"),
        _hidden("page-down", "pagedown,space", "scroll(10)"),
    ),
    "stop dialog": (
        Action("close", "escape,q", "back", does="choose('cancel')", palette=False),
        Action("stop", "s", "stop and save", does="choose('stop')", footer=False, palette=False),
        Action("detach", "d", "leave it running", does="choose('detach')", footer=False, palette=False),
    ),
    "fix list": (
        Action("close", "escape,f,q", "back", does="dismiss", written="esc", palette=False),
        Action("undo", "u", "undo", "give the last change back"),
        *(_hidden(f"take-{number}", str(number), f"take({number - 1})") for number in range(1, 6)),
    ),
    "palette": (
        Action("close", "escape", "back", does="dismiss", palette=False),
        Action("take", "enter", "do it", written="enter", first=True, palette=False),
        _hidden("up", "up", "move(-1)"),
        _hidden("down", "down", "move(1)"),
        _hidden("page-up", "pageup", "move(-8)"),
        _hidden("page-down", "pagedown", "move(8)"),
    ),
    "help dialog": (Action("close", "escape,question_mark,q,enter,f1", "close", does="dismiss", palette=False),),
}

_TOGETHER = (
    ("app", "run"),
    ("app", "wizard", "goal page"),
    ("app", "wizard", "go page"),
    ("app", "wizard", "model page"),
    ("app", "wizard", "data page"),
    ("app", "wizard", "field"),
    ("app", "rows"),
    ("app", "triage"),
    ("app", "side by side"),
    ("stop dialog",),
    ("help dialog",),
    ("fix list",),
    ("palette",),
)
"""Places whose keys are heard at the same time: there, one key means one thing."""

_WRITTEN = {
    "question_mark": "?",
    "slash": "/",
    "colon": ":",
    "escape": "esc",
    "full_stop": ".",
    "pageup": "pgup",
    "pagedown": "pgdn",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
}


def keys_of(action: Action, chosen: Mapping[str, str]) -> str:
    """Return the keys of `action` as the person has chosen them (see `clash` for what may be chosen), else its own."""
    return chosen.get(action.name, action.keys)


def written(action: Action, chosen: Mapping[str, str]) -> str:
    """Return how the keys of `action` are written, two of them at most."""
    if action.name not in chosen and action.written:
        return action.written
    keys = chosen.get(action.name, action.keys)
    return " ".join(_WRITTEN.get(key, key.replace("ctrl+", "^")) for key in keys.split(",")[:2] if key)


def help_lines(actions: Iterable[Action], chosen: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (keys, what they do) of those actions that say what they do, each once."""
    told = dict.fromkeys((written(action, chosen), action.words) for action in actions if action.label and action.keys)
    return list(told)


def names() -> tuple[str, ...]:
    """Return the names of all actions, each once, in the order of the table."""
    return tuple(dict.fromkeys(action.name for actions in PLACES.values() for action in actions))


def clash(chosen: Mapping[str, str]) -> tuple[str, str, str] | None:
    """Return a key and the two actions that both want it where they are heard together; None if there is none."""
    for together in _TOGETHER:
        wanted = [(key, action.name) for place in together for action in PLACES[place] for key in keys_of(action, chosen).split(",") if key]
        taken: dict[str, str] = {}
        for key, name in wanted:
            if taken.setdefault(key, name) != name:
                return key, taken[key], name
    return None

"""The pictures of the README are what the program draws: each is drawn again and compared, cell by cell."""

from __future__ import annotations

import difflib
import os
import time

import pictures
import pytest
import textual
from pictures import FOLDER, RENEW, SHOTS, Shot


def kept(shot: Shot) -> str:
    path = FOLDER / f"{shot.name}.txt"
    assert path.exists(), f"{path.name} is not there yet: {RENEW}"
    text = path.read_text(encoding="utf-8")
    version = text.split("\n", 1)[0].split(";")[0].removeprefix("# textual ")
    if version != textual.__version__:
        pytest.skip(f"drawn with textual {version}, and here is {textual.__version__}, which may draw otherwise: {RENEW}")
    return text


@pytest.mark.parametrize("shot", SHOTS, ids=lambda shot: shot.name)
async def test_a_picture_is_what_the_program_draws(shot, tmp_path):
    before = kept(shot)
    now = pictures.as_text(await pictures.take(shot, tmp_path))
    if now != before:
        lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "the picture", "the screen now", lineterm="", n=1)
        told = "\n".join(list(lines)[:60])
        pytest.fail(f"{shot.name} looks different now. If that is meant, draw it anew: {RENEW}\n{told}", pytrace=False)


@pytest.mark.parametrize("shot", SHOTS, ids=lambda shot: shot.name)
def test_the_svg_is_made_of_the_same_cells(shot):
    rows = pictures.of_text(kept(shot))
    assert (len(rows), len(rows[0])) == (shot.size[1], shot.size[0])
    svg = (FOLDER / f"{shot.name}.svg").read_text(encoding="utf-8")
    assert svg == pictures.as_svg(rows, pictures.TITLES[shot.scene]), f"draw it anew: {RENEW}"
    assert len(svg) < 60_000
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", ""), "a picture fetches nothing"


def test_no_picture_is_left_that_nobody_draws():
    assert {path.stem for path in FOLDER.iterdir()} == {shot.name for shot in SHOTS}


def test_what_is_frozen_thaws(tmp_path):
    before, folder = dict(os.environ), os.getcwd()  # noqa: PTH109  as the program sees it
    with pictures.frozen(tmp_path, 1000.0):
        assert time.time() == 1000.0
        assert time.localtime(0).tm_hour == 0
        assert os.environ["QLORA_TUI_HOME"].startswith(str(tmp_path))
    assert time.time() > 1e9
    assert (dict(os.environ), os.getcwd()) == (before, folder)  # noqa: PTH109


def test_a_changed_cell_is_seen():
    row = [("a", "#ffffff", "#000000", "")]
    other = [("a", "#ffffff", "#000000", "b")]
    assert pictures.as_text([row]) != pictures.as_text([other])
    assert pictures.of_text(pictures.as_text([row])) == [row]

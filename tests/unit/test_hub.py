"""Model files: folders checked, the hub asked once, by commit, and never for code."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import hub
from qlora_tui.engine.errors import ConfigError, FetchError, ModelError, Stopped

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"w" * 5000,
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}


class FakeHub:
    """The few endpoints that the hub's client uses, on 127.0.0.1."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.status: dict[str, tuple[int, str]] = {}
        self.file_status: tuple[int, str] | None = None
        self.asked: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                return

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                fake.asked.append(f"{self.command} {path}")
                if path.startswith("/api/models/"):
                    self._send(*fake.model_info(path.removeprefix("/api/models/")), body)
                    return
                name = path.rsplit("/", 1)[-1]
                content = fake.files.get(name)
                if content is None or fake.file_status:
                    status, code = fake.file_status or (404, "EntryNotFound")
                    self._send(status, b"", {"X-Error-Code": code}, body)
                    return
                self._send(200, content, {"ETag": f'"{fake.etag(name)}"', "X-Repo-Commit": COMMIT}, body)

            def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @staticmethod
    def etag(name: str) -> str:
        return name.encode().hex()[:40].ljust(40, "0")

    def model_info(self, what: str) -> tuple[int, bytes, dict[str, str]]:
        name = what.partition("/revision/")[0]
        if name in self.status:
            status, code = self.status[name]
            return status, b"{}", {"X-Error-Code": code}
        siblings = [{"rfilename": part, "size": len(data), "blobId": self.etag(part)} for part, data in self.files.items()]
        return 200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {"Content-Type": "application/json"}


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


WHOLE = "\2\0\0\0\0\0\0\0{}"
"""A safetensors file without a tensor: the length of its header, and the header."""


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_folder_with_config_and_weights_is_complete(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", config__json="{}", model__safetensors=WHOLE)
    assert hub.small_files(str(model)) == hub.ModelFiles(model, commit="", complete=True)
    assert hub.weights(str(model), "main", "", _no_progress, _never) == model


def test_a_folder_with_a_tokenizer_alone_serves_looking_at_data_but_not_training(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", tokenizer__json="{}")
    assert not hub.small_files(str(model)).complete
    with pytest.raises(ModelError, match="weights are missing"):
        hub.weights(str(model), "main", "", _no_progress, _never)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no config.json and no tokenizer"),
        ({"config__json": "{}"}, "no weights here"),
        ({"config__json": "{}", "pytorch_model__bin": "x"}, "pickled form"),
        ({"config__json": "{}", "adapter_config__json": "{}"}, "an adapter, not a model"),
        ({"config__json": "{}", hub.INDEX.replace(".", "__"): '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'}, "missing"),
        ({"config__json": "{}", hub.INDEX.replace(".", "__"): "{torn"}, "cannot be read"),
        ({"config__json": "{}", "model__safetensors": WHOLE + "x"}, "model.safetensors is cut off"),
        ({"config__json": "{}", "model__safetensors": "version https://git-lfs"}, "model.safetensors is cut off or no safetensors"),
        ({"config__json": "{}", "model__safetensors": ""}, "model.safetensors is cut off"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_refused_in_one_sentence(tmp_path: Path, files: dict[str, str], message: str) -> None:
    model = folder(tmp_path / "m", **files)
    with pytest.raises(ModelError, match=message) as caught:
        hub.small_files(str(model))
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        hub.small_files(name)


def test_a_file_and_an_odd_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ModelError, match="this is a file"):
        hub.small_files(str(tmp_path / "model.gguf"))
    with pytest.raises(ConfigError, match="neither a folder nor a hub id") as caught:
        hub.small_files("a b\x1b[31m")
    assert "\x1b" not in str(caught.value)


def test_small_files_come_by_commit_without_weights_or_code(fake_hub: FakeHub) -> None:
    files = hub.small_files("some/model")
    assert (files.commit, files.complete) == (COMMIT, False)
    assert {path.name for path in files.folder.iterdir()} == {"config.json", "tokenizer.json"}


def test_weights_follow_in_a_child_and_are_fetched_once(fake_hub: FakeHub) -> None:
    files = hub.small_files("some/model")
    seen: list[tuple[int, int]] = []
    where = hub.weights("some/model", "main", files.commit, lambda done, total: seen.append((done, total)), _never)
    assert where == files.folder
    assert (where / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert seen[-1] == (5000, 5000)
    assert not {path.name for path in where.iterdir()} & {"modeling_evil.py", "pytorch_model.bin"}
    fake_hub.asked.clear()
    assert hub.weights("some/model", "main", files.commit, _no_progress, _never) == where
    assert fake_hub.asked == []
    assert hub.small_files("some/model").complete


def test_a_wish_to_stop_ends_the_fetch(fake_hub: FakeHub) -> None:
    files = hub.small_files("some/model")
    with pytest.raises(Stopped, match="stopped while fetching some/model"):
        hub.weights("some/model", "main", files.commit, _no_progress, lambda: True)


def test_an_unreachable_hub_is_said_in_one_sentence_and_the_cache_is_used_instead(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    files = hub.small_files("some/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.small_files("some/model") == files
    with pytest.raises(FetchError, match="could not be reached for other/model") as caught:
        hub.small_files("other/model")
    assert "\n" not in str(caught.value)


def test_offline_asks_nobody(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    files = hub.small_files("some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake_hub.asked.clear()
    assert hub.small_files("some/model") == files
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        hub.small_files("other/model")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        hub.weights("some/model", "main", files.commit, _no_progress, _never)
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "no such model on the hub"),
        (403, "GatedRepo", "licence"),
        (404, "RevisionNotFound", "no revision main"),
    ],
)
def test_what_the_hub_says_is_passed_on_in_plain_words(fake_hub: FakeHub, status: int, code: str, message: str) -> None:
    fake_hub.status["some/model"] = (status, code)
    with pytest.raises(ModelError, match=message):
        hub.small_files("some/model")


def test_a_licence_asked_for_at_the_first_file_is_passed_on_too(fake_hub: FakeHub) -> None:
    fake_hub.file_status = (403, "GatedRepo")
    with pytest.raises(ModelError, match="licence") as caught:
        hub.small_files("some/model")
    assert "hf auth login" in str(caught.value)


def test_a_repository_with_pickled_weights_only_is_refused_before_anything_is_fetched(fake_hub: FakeHub) -> None:
    del fake_hub.files["model.safetensors"]
    with pytest.raises(ModelError, match="pickled form"):
        hub.small_files("some/model")
    assert [line for line in fake_hub.asked if "/resolve/" in line] == []


def test_shards_are_chosen_over_other_safetensors() -> None:
    names = [hub.INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"]
    assert hub.pick_weights(names, "x") == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def _no_progress(done: int, total: int) -> Any:
    return None


def _never() -> bool:
    return False

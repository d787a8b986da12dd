"""Networks of the hub: downloaded once, explained without network; the hub is a server of this test."""

from __future__ import annotations

import hashlib
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from timm_folders import save_folder

from utils.core.errors import UserError
from utils.discovery import hubs
from utils.discovery.model_folders import read_model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the repositories below `hub.files`; `hub.requests` are the paths that were asked for."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            content = self.answer()
            if content is not None:
                self.wfile.write(content)

        def answer(self):
            server.requests.append((self.command, self.path))
            if self.path == "/":
                self.send_response(200)
                self.end_headers()
                return None
            organisation, name, _, revision, file = self.path.strip("/").split("/")
            repository = server.files / organisation / name
            path = repository / file
            if revision not in ("main", "v2") or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if repository.is_dir() else "RepoNotFound")
                self.end_headers()
                return None
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return content

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.requests = tmp_path / "hub", []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the client reads the environment once
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_repository_is_downloaded_once_without_its_other_files(hub, tmp_path):
    save_folder(hub.files / "org" / "leaf", ["a", "b"], label_names=["a", "b"])
    (hub.files / "org" / "leaf" / "modeling.py").write_text("raise SystemExit")
    folder = hubs.download("org/leaf", tmp_path / "weights", "--add leaf=hf-hub:org/leaf")
    assert folder == tmp_path / "weights" / "org" / "leaf"
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (
        hub.files / "org" / "leaf" / "model.safetensors"
    ).read_bytes()
    assert read_model_folder(folder).classes == ("a", "b")
    count = len(hub.requests)
    assert hubs.download("org/leaf", tmp_path / "weights", "--add") == folder
    assert len(hub.requests) == count


def test_a_revision_and_weights_of_torch_are_downloaded(hub, tmp_path):
    save_folder(hub.files / "org" / "leaf", ["a", "b"])
    (hub.files / "org" / "leaf" / "model.safetensors").rename(hub.files / "org" / "leaf" / "pytorch_model.bin")
    folder = hubs.download("org/leaf@v2", tmp_path / "weights", "--add")
    assert folder == tmp_path / "weights" / "org" / "leaf@v2"
    assert (folder / "pytorch_model.bin").is_file()
    assert any("/resolve/v2/" in path for _, path in hub.requests)


def test_what_the_hub_lacks_is_named(hub, tmp_path):
    with pytest.raises(UserError, match=r"^--add: .* has no repository org/none, or it needs a token"):
        hubs.download("org/none", tmp_path / "weights", "--add")
    save_folder(hub.files / "org" / "leaf", ["a", "b"])
    (hub.files / "org" / "leaf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"org/leaf has neither model\.safetensors nor pytorch_model\.bin"):
        hubs.download("org/leaf", tmp_path / "weights", "--add")
    (hub.files / "org" / "leaf" / "config.json").unlink()
    with pytest.raises(UserError, match=r"org/leaf has no config\.json"):
        hubs.download("org/leaf", tmp_path / "weights", "--add")


@pytest.mark.parametrize("is_set", [True, False])
def test_without_network_the_error_says_what_to_download_and_where_to_put_it(tmp_path, monkeypatch, is_set):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if is_set else "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_set)
    with pytest.raises(UserError) as error:
        hubs.download("org/leaf@v2", tmp_path / "weights", "--add leaf=hf-hub:org/leaf@v2")
    message = str(error.value)
    assert message.startswith("--add leaf=hf-hub:org/leaf@v2: ")
    assert ("HF_HUB_OFFLINE is set" if is_set else "http://127.0.0.1:9 cannot be reached (") in message
    folder = tmp_path / "weights" / "org" / "leaf@v2"
    assert "Download config.json, model.safetensors (or pytorch_model.bin)" in message
    assert f"from http://127.0.0.1:9/org/leaf/tree/v2 where there is network, put them into {folder}" in message
    save_folder(tmp_path / "by_hand", ["a", "b"])
    folder.parent.mkdir(parents=True)
    shutil.move(tmp_path / "by_hand", folder)
    assert hubs.download("org/leaf@v2", tmp_path / "weights", "--add") == folder


@pytest.mark.parametrize("name", ["leaf", "org/leaf/more", "../leaf", "org/..", "/etc/passwd", "org/leaf@", "a b/c"])
def test_names_that_are_none_of_the_hub_are_refused_before_anything_is_asked_for(hub, tmp_path, name):
    with pytest.raises(UserError, match="is no name of the hub; expected ORG/NAME or ORG/NAME@REVISION"):
        hubs.download(name, tmp_path / "weights", "--add")
    assert hub.requests == []


def test_timm_says_which_repository_has_its_weights():
    assert hubs.repository_of("test_resnet", "--add") == ("timm/test_resnet.r160_in1k", 1000)
    with pytest.raises(
        UserError,
        match=r"no weights on the hub for vit_base_patch16_18x2_224.*NAME=timm:vit_base_patch16_18x2_224@FILE",
    ):
        hubs.repository_of("vit_base_patch16_18x2_224", "--add")

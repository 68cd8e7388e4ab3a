"""The weights cache against a hub on the loopback interface that misbehaves in every way we could think of."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from mvcr_cli import hub as hub_client
from mvcr_cli import weights
from mvcr_cli.config import PRESET_NAMES, TrainConfig
from mvcr_cli.engine.starting import starting_weights
from mvcr_cli.errors import CannotCreate, ExitCode, MvcrError, NotPermitted, Unavailable, UsageError, WriteFailed

TENSORS = {"conv1.weight": np.arange(30_000, dtype=np.float32)}
BODY = save(TENSORS)
OTHER_BODY = save({"conv1.weight": np.arange(30_000, dtype=np.float32) + 1})
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!doctype html><title>no</title>\n<h1>not here</h1>"


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's protocol that a download needs: /resolve/ redirects to a blob on another host."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.body = BODY
        self.commit = COMMIT
        self.fault = ""
        self.part = 0
        self.pause = 0.0
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.release = threading.Event()

    @property
    def downloads(self) -> int:
        return sum(method == "GET" and path == "/blob" for method, path, _ in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients hang up on purpose


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        if hub.fault == "silent":
            hub.release.wait()
        elif hub.fault == "404":
            self.page(404)
        elif hub.fault == "login page":
            self.page(200)
        elif self.path == "/blob":
            self.blob()
        elif self.path.endswith("/model.safetensors"):
            self.resolve()
        else:
            self.page(404)

    def page(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(PAGE)

    def resolve(self) -> None:
        hub = self.server
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{hub.server_port}/blob")
        self.send_header("ETag", '"not-the-digest"')
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(hub.body).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(hub.body)))
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("X-Xet-Hash", "0" * 64)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def blob(self) -> None:
        hub = self.server
        fault = hub.fault
        time.sleep(hub.pause)
        if fault == "404 blob":
            self.page(404)
            return
        body = OTHER_BODY if fault == "other bytes" else hub.body
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if fault == "cut, ranges" else 0
        self.send_response(206 if start else 200)
        if fault != "too much":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
        elif fault == "cut, ranges":
            self.wfile.write(body[start : start + hub.part])
        elif fault == "half, silent":
            self.wfile.write(body[: len(body) // 2])
            hub.release.wait()
        elif fault == "drip":
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                if hub.release.wait(0.05):
                    return
        else:
            self.wfile.write(body + b"more" if fault == "too much" else body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, an empty cache, and time-outs short enough for a test."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub()
    for variable in ("MVCR_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MVCR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(hub_client, "CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(hub_client, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(hub_client, "STALL_SECONDS", 0.5)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.release.set()
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "weights" / "resnet18.a1_in1k.safetensors"


def flip(path: Path) -> bytes:
    """Change one bit in the middle, and give back what is there now."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    return bytes(body)


def left_behind(path: Path) -> set[str]:
    """What lies in the cache besides the lock."""
    return {entry.name for entry in path.parent.iterdir()} - {f".{path.name}.lock"}


def forbid_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cached(model: str) -> Path | None:
    try:
        return weights.pretrained(model, offline=True)
    except Unavailable:
        return None


def test_first_use_downloads_and_pins(hub: Hub, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    assert cached("mvcr18") is None
    assert weights.pretrained("mvcr18", say=told.append) == path
    assert path.read_bytes() == BODY
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert np.array_equal(load_file(path)["conv1.weight"], TENSORS["conv1.weight"])
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "repo": "timm/resnet18.a1_in1k",
        "filename": "model.safetensors",
        "revision": COMMIT,
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "size": len(BODY),
    }
    assert left_behind(path) == {path.name, path.with_suffix(".json").name}
    assert told == [f"downloading timm/resnet18.a1_in1k from http://127.0.0.1:{hub.server_port} (0.1 MB)"]
    assert capfd.readouterr() == ("", "")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_asked_or_told_beyond_the_file(hub: Hub) -> None:
    weights.pretrained("resnet18")
    assert [(method, path) for method, path, _ in hub.requests] == [
        ("HEAD", "/timm/resnet18.a1_in1k/resolve/main/model.safetensors"),
        ("GET", f"/timm/resnet18.a1_in1k/resolve/{COMMIT}/model.safetensors"),
        ("GET", "/blob"),
    ]
    for _, _, headers in hub.requests:
        assert "authorization" not in headers
        assert "cookie" not in headers
        assert "torch" not in headers["user-agent"]
        assert "agent/" not in headers["user-agent"]


def test_a_cached_trunk_is_shared_and_asks_nobody(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.pretrained("mvcr18")
    asked = len(hub.requests)
    forbid_sockets(monkeypatch)
    assert weights.pretrained("resnet18") == cached("mvcr18") == cached("resnet18") == path
    assert len(hub.requests) == asked


def test_a_read_only_cache_serves_what_it_has(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.pretrained("mvcr18")
    before = {entry: entry.stat().st_mtime_ns for entry in path.parent.iterdir()}

    def read_only(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "read-only")

    for name in ("mkdir", "rename", "replace", "remove", "unlink", "utime"):
        monkeypatch.setattr(os, name, read_only)
    assert weights.pretrained("mvcr18") == path
    assert {entry: entry.stat().st_mtime_ns for entry in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("fault", "reason", "limit_seconds"),
    [
        ("404", "answered 404", 1.0),
        ("404 blob", "answered 404, after 0 of", 1.0),
        ("login page", "does not answer like a hub", 1.0),
        ("cut", "of 120,0", 1.0),
        ("other bytes", "SHA-256", 1.0),
        ("too much", "sent too much", 1.0),
        ("silent", "timed out", 1.5),
        ("half, silent", "timed out", 2.5),
        ("drip", "almost stopped sending", 2.5),
    ],
)
def test_a_bad_download_is_one_sentence_and_no_file(
    hub: Hub, path: Path, fault: str, reason: str, limit_seconds: float
) -> None:
    hub.fault = fault
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        weights.pretrained("mvcr18")
    assert time.monotonic() - began < limit_seconds
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    assert reason in caught.value.message
    assert f"http://127.0.0.1:{hub.server_port}" in caught.value.message
    assert "\n" not in caught.value.message
    assert "<" not in caught.value.message
    for way_out in ("--weights none", "--weights PATH", "HF_ENDPOINT"):
        assert way_out in caught.value.hint
    assert left_behind(path) == set()
    assert cached("mvcr18") is None
    hub.fault = ""
    assert weights.pretrained("mvcr18").read_bytes() == BODY


@pytest.mark.parametrize(("fault", "connections"), [("cut", 2), ("cut, ranges", 3)])
def test_a_cut_body_is_not_asked_for_without_end(hub: Hub, fault: str, connections: int) -> None:
    """Without ranges the second connection brings no more than the first; with them, the third is the last."""
    hub.fault = fault
    hub.part = 1000
    with pytest.raises(Unavailable):
        weights.pretrained("mvcr18")
    assert hub.downloads == connections


def test_a_cut_download_goes_on_where_it_was_cut(hub: Hub) -> None:
    hub.fault = "cut, ranges"
    part = hub.part = len(BODY) // 3 + 1
    assert weights.pretrained("mvcr18").read_bytes() == BODY
    ranges = [headers.get("range") for _, path_, headers in hub.requests if path_ == "/blob"]
    assert ranges == [None, f"bytes={part}-", f"bytes={2 * part}-"]


def test_no_server(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://user:password@127.0.0.1:{free_port}")
    with pytest.raises(Unavailable) as caught:
        weights.pretrained("mvcr18")
    assert f"http://127.0.0.1:{free_port}" in caught.value.message
    assert "password" not in caught.value.message + caught.value.hint


def test_a_name_look_up_that_hangs_is_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> NoReturn:
        hub.release.wait()
        raise socket.gaierror("no name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="no answer within 1 seconds"):
        weights.pretrained("mvcr18")
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("address", ["huggingface.co", "ftp://x", "https://", "http://x:port", "http://[::1"])
def test_an_endpoint_that_is_no_address_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT is"):
        weights.pretrained("mvcr18")


def test_a_flipped_bit_is_noticed_moved_aside_and_downloaded_again(hub: Hub, path: Path) -> None:
    weights.pretrained("mvcr18")
    bad = flip(path)
    assert cached("mvcr18") is None
    told: list[str] = []
    assert weights.pretrained("mvcr18", say=told.append).read_bytes() == BODY
    aside = path.with_name(path.name + ".damaged")
    assert aside.read_bytes() == bad
    assert hub.downloads == 2
    assert "damaged" in told[0]
    assert str(aside) in told[0]


@pytest.mark.parametrize("switch", ["argument", "MVCR_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("state", ["absent", "intact", "damaged", "no record", "bad record"])
def test_offline_opens_no_socket(
    hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch, switch: str, state: str
) -> None:
    if state != "absent":
        weights.pretrained("mvcr18")
    if state == "damaged":
        flip(path)
    elif state == "no record":
        path.with_suffix(".json").unlink()
    elif state == "bad record":
        path.with_suffix(".json").write_text('{"repo": "timm/resnet18.a1_in1k", "sha256": 5}')
    before = path.read_bytes() if path.exists() else None
    forbid_sockets(monkeypatch)
    if switch != "argument":
        monkeypatch.setenv(switch, "1")
    if state == "intact":
        assert weights.pretrained("mvcr18", offline=switch == "argument") == path
        return
    with pytest.raises(Unavailable) as caught:
        weights.pretrained("mvcr18", offline=switch == "argument")
    assert caught.value.exit_code == 69
    assert str(path) in caught.value.message
    assert {"damaged": "damaged", "absent": "not in the cache"}.get(state, "no valid record") in caught.value.message
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_first_commit_stays_the_pin(hub: Hub, path: Path) -> None:
    weights.pretrained("mvcr18")
    path.unlink()
    hub.requests.clear()
    weights.pretrained("mvcr18")
    assert all(COMMIT in path_ for _, path_, _ in hub.requests if path_ != "/blob")

    path.unlink()
    hub.body = OTHER_BODY
    with pytest.raises(Unavailable, match="other weights than at the first download"):
        weights.pretrained("mvcr18")
    assert not path.exists()


def test_a_file_without_a_record_is_checked_against_the_hub(hub: Hub, path: Path) -> None:
    weights.pretrained("mvcr18")
    record = path.with_suffix(".json").read_bytes()
    for spoiled in (None, b"", b"[]", b"\xff", b'{"repo": 1}', record.replace(COMMIT.encode(), b"main")):
        path.with_suffix(".json").unlink()
        if spoiled is not None:
            path.with_suffix(".json").write_bytes(spoiled)
        assert weights.pretrained("mvcr18") == path
        assert path.with_suffix(".json").read_bytes() == record
    assert hub.downloads == 1


STARTER = "import sys; from mvcr_cli.weights import pretrained; print(pretrained('mvcr18', say=lambda _: None))"


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)


def test_eight_starters_download_once(hub: Hub, path: Path) -> None:
    hub.pause = 0.5
    starters = [start() for _ in range(8)]
    assert [starter.communicate(timeout=60)[0].strip() for starter in starters] == [str(path)] * 8
    assert hub.downloads == 1
    assert sum(method == "HEAD" for method, _, _ in hub.requests) == 1


def test_a_starter_that_is_killed_leaves_no_lock_and_no_rest(hub: Hub, path: Path) -> None:
    hub.fault = "half, silent"
    starter = start()
    deadline = time.monotonic() + 10
    while not hub.downloads and time.monotonic() < deadline:
        time.sleep(0.02)
    starter.kill()
    starter.communicate()
    assert any(name.endswith(".tmp") for name in left_behind(path))
    hub.fault = ""
    assert weights.pretrained("mvcr18").read_bytes() == BODY
    assert left_behind(path) == {path.name, path.with_suffix(".json").name}


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, NotPermitted), (errno.EROFS, WriteFailed)])
def test_a_cache_that_cannot_be_made(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[MvcrError]
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(kind, match="cannot write") as caught:
        weights.pretrained("mvcr18")
    assert "MVCR_HOME" in caught.value.hint
    assert hub.requests == []


def test_a_file_in_place_of_the_cache(hub: Hub, path: Path) -> None:
    path.parent.parent.write_bytes(b"")
    assert cached("mvcr18") is None
    with pytest.raises(CannotCreate) as caught:
        weights.pretrained("mvcr18")
    assert "MVCR_HOME" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, NotPermitted), (errno.EROFS, WriteFailed), (errno.ENOTDIR, CannotCreate)]
)
def test_without_a_cache_auto_trains_from_scratch_and_imagenet_is_refused(hub, monkeypatch, number, kind):
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    told: list[str] = []
    start = starting_weights(TrainConfig(data=Path("data")), told.append)
    assert (start.source, start.pretrained) == ("random weights", False)
    assert len(told) == 1 and "cannot write" in told[0] and told[0].endswith("training from scratch")
    with pytest.raises(kind):
        starting_weights(TrainConfig(data=Path("data"), weights="imagenet"), told.append)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(hub: Hub, path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o500)
    with pytest.raises(NotPermitted):
        weights.pretrained("mvcr18")


def test_a_disk_that_is_full_before(hub: Hub, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(WriteFailed, match=f"no space for {len(BODY):,} bytes"):
        weights.pretrained("mvcr18")
    assert hub.downloads == 0
    assert left_behind(path) == set()


def test_a_disk_that_fills_up(hub: Hub, path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) // 2, hard))
    try:
        with pytest.raises(WriteFailed) as caught:
            weights.pretrained("mvcr18")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "MVCR_HOME" in caught.value.hint
    assert left_behind(path) == set()


def test_models_without_a_trunk_say_which_have_one(hub: Hub) -> None:
    without = set(PRESET_NAMES) - set(weights.SOURCES)
    assert without == {f"{kind}{size}" for kind in ("mvcr", "resnet") for size in ("10n", "14n", "10")} | {"cnn"}
    for model in without:
        with pytest.raises(UsageError, match="no pretrained weights") as caught:
            weights.pretrained(model)
        assert "mvcr18" in caught.value.hint
        assert "--weights none" in caught.value.hint
    with pytest.raises(UsageError, match="no model"):
        weights.pretrained("mvcr19")
    assert hub.requests == []


def test_the_hub_library_is_imported_only_for_a_download(hub: Hub, path: Path) -> None:
    weights.pretrained("mvcr18")
    code = f"{STARTER}; assert not {{'huggingface_hub', 'torch'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=15).returncode == 0

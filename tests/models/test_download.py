"""Downloads from a server on this machine that drops connections, answers no, or sends something else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from models.loading import SMALL, assert_equal, small
from models.released import theirs, write_released

from vmamba import create_model, load_checkpoint
from vmamba.errors import CheckpointError
from vmamba.models.download import download


class Server:
    """A web server on this machine whose connections can be made to fail."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.failures: list[str] = []  # what happens to the next requests: an HTTP status, "drop" or "short"
        self.requests: list[str | None] = []  # their Range headers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.headers["Range"])
                failure = server.failures.pop(0) if server.failures else ""
                if failure.isdigit():
                    self.send_error(int(failure))
                    return
                start, etag = 0, '"v1"'
                if self.headers["Range"] and self.headers["If-Range"] == etag and failure != "whole":
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                body = server.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                if failure != "short":
                    self.send_header("ETag", etag)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if failure in ("drop", "short") else body)
                self.close_connection = True

            def log_message(self, *arguments: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/releases/%23v2cls/weights%20a.pth"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vmamba.models.download._RETRY_AFTER", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    path = write_released(tmp_path / "weights.pth", theirs(small().state_dict()))
    server = Server(path.read_bytes())
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache" / "hub" / "checkpoints"))


def test_download_goes_to_the_cache_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = download(server.url)
    assert path == tmp_path / "cache" / "hub" / "checkpoints" / "weights a.pth"
    assert path.read_bytes() == server.content
    assert "weights a.pth" in capsys.readouterr().err
    assert download(server.url) == path
    assert server.requests == [None]
    assert in_cache(tmp_path) == ["weights a.pth"]


def test_dropped_connection_is_taken_up_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.failures = ["drop", "drop"]
    size = len(server.content)
    assert download(server.url, progress=False).read_bytes() == server.content
    assert server.requests == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert in_cache(tmp_path) == ["weights a.pth"]


@pytest.mark.parametrize("failures", [["short", "short"], ["drop", "whole"], ["503", "429"]], ids=str)
def test_download_starts_again_where_it_has_to(failures: list[str], server: Server) -> None:
    server.failures = failures
    assert download(server.url, progress=False).read_bytes() == server.content


@pytest.mark.parametrize(("failure", "tries"), [("404", 1), ("403", 1), ("500", 4), ("short", 4)])
def test_failed_download_leaves_nothing(failure: str, tries: int, server: Server, tmp_path: Path) -> None:
    server.failures = [failure] * 9
    with pytest.raises(CheckpointError) as caught:
        download(server.url, progress=False)
    message, path = str(caught.value), tmp_path / "cache" / "hub" / "checkpoints" / "weights a.pth"
    reason = f"after {len(server.content) // 2} of {len(server.content)} bytes" if failure == "short" else failure
    for word in (server.url, str(path), "checkpoint=PATH", reason):
        assert word in message
    assert len(server.requests) == tries
    assert in_cache(tmp_path) == []


def test_page_in_place_of_weights_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>Sign in to this network</html>"
    with pytest.raises(CheckpointError, match="what the server sent is a web page"):
        download(server.url, progress=False)
    assert in_cache(tmp_path) == []


def test_unknown_server_and_wrong_address(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot download http://unknown\.invalid/weights\.pth"):
        download("http://unknown.invalid/weights.pth", progress=False)
    assert in_cache(tmp_path) == []
    for url in ("file:///etc/passwd", "weights.pth", "https://example.org/", "https://example.org/a/%2e%2e"):
        with pytest.raises(ValueError, match=r"expected http\(s\)"):
            download(url)


def test_downloads_side_by_side_do_no_harm(server: Server, tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download(server.url, progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert paths[0].read_bytes() == server.content
    assert in_cache(tmp_path) == ["weights a.pth"]


def test_pretrained_model_is_downloaded_and_loaded(server: Server) -> None:
    overlay = {"url": server.url, "num_classes": 10, "input_size": (3, 28, 28)}
    expected = small()
    load_checkpoint(expected, download(server.url))
    model = small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert_equal(model, expected.state_dict())
    adapted = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    assert torch.equal(adapted.stages[2].downsample.conv.weight, expected.stages[2].downsample.conv.weight)
    assert adapted.head.fc.out_features == 3
    features = create_model(SMALL, in_chans=3, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(features.state_dict()["model.stem.conv1.weight"], expected.stem.conv1.weight)

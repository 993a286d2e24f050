"""What the server gives to a stranger who does not use the page: itself, and nothing of the machine."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import sys
from urllib.parse import urlsplit

import pytest
from app.conftest import free_port

from vmamba.app import guard


def ask(address: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and content, of an address that nobody has tidied up."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.putrequest("GET" if body is None else "POST", path, skip_accept_encoding=True)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body or b"")))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file={secret}", "/file={secret}", "/gradio_api/file/{secret}", "/gradio_api/file=/etc/hostname",
        "/gradio_api/file=../../secret.txt", "/gradio_api/file=http://127.0.0.1/", "/gradio_api/proxy=http://[::1]/",
        "/assets/../../../../../../../../..{secret}", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{secret}",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..{secret}", "/assets/{secret}", "/static/{secret}",
        "/static/..%5c..%5c..%5c..{secret}", "/gradio_api/custom_component/x/client/component/{secret}", "/svelte/a",
        "/gradio_api/info", "/gradio_api/openapi.json", "/docs", "/openapi.json", "/monitoring", "/gradio_api/app_id",
        "/gradio_api/run-history/records", "/gradio_api/upload_progress?upload_id=a", "/runs", "/gradio_api/vibe-code",
    ],
)  # fmt: skip
def test_no_file_of_the_machine_is_given_away(address, desk, path):
    status, content = ask(address, path.format(secret=desk / "secret.txt"))
    assert status in (403, 404)
    assert b"secret of this machine" not in content


def test_nothing_can_be_left_on_the_machine(address):
    for path in (
        "upload",
        "stream/a",
        "component_server",
        "process_recording",
        "run/predict",
        "call/start",
        "vibe-edit",
    ):
        assert ask(address, f"/gradio_api/{path}", b"{}")[0] == 403


def event(value: object) -> bytes:
    return json.dumps({"data": [value], "fn_index": 0, "session_hash": "a", "event_data": None}).encode()


def test_events_that_name_files_or_addresses_are_refused(address, desk):
    file = {"path": str(desk / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    for value in (file, [[{"deep": file}]], {"url": "http://127.0.0.1:1/"}, file | {"path": "http://127.0.0.1:1/"}):
        assert ask(address, "/gradio_api/queue/join", event(value))[0] == 403
    disguised = event(file).replace(b"path", b"\\u0070ath").replace(b"FileData", b"\\u0046ileData")
    assert ask(address, "/gradio_api/queue/join", disguised)[0] == 403
    assert ask(address, "/gradio_api/queue/join", b"[" * 100_000)[0] == 403
    assert ask(address, "/gradio_api/queue/join", event(None))[0] == 200


def test_an_event_larger_than_a_picture_may_be_is_refused(address, monkeypatch):
    assert len(event(base64.b64encode(bytes(guard.MOST_BYTES)).decode())) < guard.MOST_BODY
    monkeypatch.setattr(guard, "MOST_BODY", 50_000)
    assert ask(address, "/gradio_api/queue/join", event("a" * 49_000))[0] == 200
    assert ask(address, "/gradio_api/queue/join", event("a" * 51_000))[0] == 413


def test_only_this_machine_is_listened_to(address):
    port = urlsplit(address).port
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_the_page_names_no_address_that_a_browser_would_load_from_elsewhere(address):
    status, content = ask(address, "/")
    assert status == 200
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']([^\"']+)", content.decode())
    assert loaded
    assert [url for url in loaded if url.startswith(("http:", "https:", "//"))] == []
    config = json.loads(ask(address, "/config")[1])
    assert config["analytics_enabled"] is False
    assert config["stylesheets"] == []
    style = ask(address, "/theme.css")[1].decode()
    assert "--font:" in style
    assert re.findall(r"@import|url\((?![\"']?data:)", style) == []


def test_the_server_itself_calls_nobody(page, desk):
    hosts, listening = [], True

    def hook(event: str, arguments: tuple) -> None:  # cannot be taken away again
        if listening and event == "socket.getaddrinfo":
            hosts.append(arguments[0])
        elif listening and event == "socket.connect" and isinstance(arguments[1], tuple):
            hosts.append(arguments[1][0])

    from vmamba.app.page import Page, serve

    sys.addaudithook(hook)
    again = Page(page.catalogue, [desk / "pictures/a.png"])
    assert ask(serve(again, port=free_port(), block=False), "/")[0] == 200
    again.blocks.close(verbose=False)
    listening = False
    assert hosts  # this test's own
    assert set(hosts) <= {"127.0.0.1", "localhost", None}

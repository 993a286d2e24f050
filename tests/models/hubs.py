"""A hub on this machine that answers the client of the Hugging Face Hub as the real one does, for downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Hub(BaseHTTPRequestHandler):
    folders: dict[str, Path]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        folder = self.folders.get(repository)
        problem = "RepoNotFound" if folder is None else "RevisionNotFound" if revision not in ("main", "v1") else None
        if problem is None and not (folder / name).is_file():
            problem = "EntryNotFound"
        if problem:
            self.send_response(404)
            self.send_header("X-Error-Code", problem)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = (folder / name).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", hashlib.sha1(repository.encode()).hexdigest())
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[str]:
    """The address of a hub with these repositories, "OWNER/NAME" to a folder."""
    handler = type("Handler", (_Hub,), {"folders": folders})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

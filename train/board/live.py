"""The page of a run while it goes on: served to this machine's own browser, made anew when the run has changed."""

import errno
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from conf.errors import UserError
from conf.schema import ReportRun
from train.engine.metric_log import say

if TYPE_CHECKING:
    from train.board.data_facts import DataFacts

HOST = "127.0.0.1"
NICENESS = 10  # what trains beside it goes first
SHARE = 0.01  # of the time at most that making the page anew takes
LOOK_EVERY_S = 2.0  # between two looks whether the run has changed
SHARDS = ("*/*/manifest.json",)
WATCHED = ("*/metrics.jsonl", "*/samples/*.png", "*/grid.png", "*/DONE", ".stages/*.json", *SHARDS)


class LivePage:
    """The page as it was made last.

    Args:
        cfg: the options of the report.
    """

    def __init__(self, cfg: ReportRun) -> None:
        self.cfg, self.folder = cfg, Path(cfg.run_dir)
        self.lock = threading.Lock()
        self.content, self.version = b"", ""  # of the run as it was then
        self.data: DataFacts | None = None
        self.looked_at_shards = ""  # their state, that `data` is of
        self.looked_at = self.due_at = float("-inf")  # on the clock that never jumps

    def current(self) -> str:
        """The version that there is, made anew if the run has changed and it is time to."""
        with self.lock:
            now = time.monotonic()
            if now >= self.due_at and now - self.looked_at >= LOOK_EVERY_S:
                self.looked_at, version = now, self.newest()
                if version != self.version or not self.content:
                    self._make(version)
            return self.version

    def newest(self, patterns: Sequence[str] = WATCHED) -> str:
        """Tells states of the run, or of some of its files, apart."""
        files = [path.stat() for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()]
        return f"{len(files)}-{max((file.st_mtime_ns for file in files), default=0)}"

    def _make(self, version: str) -> None:
        self.look_at_data()
        began = time.process_time()
        self.content, self.version = self.render(version).encode(), version
        self.due_at = time.monotonic() + (time.process_time() - began) / SHARE

    def look_at_data(self) -> None:
        """Read thousands of images where they are others now; not a part of each making of the page."""
        from train.board.data_facts import look  # torch comes with it: only for who looks
        from train.board.run_folder import RunFolder

        shards = self.newest(SHARDS)
        if shards != self.looked_at_shards:
            self.data, self.looked_at_shards = look(self.cfg, RunFolder(self.folder)), shards

    def render(self, version: str) -> str:
        """The page of the run as it is."""
        from train.board.report import render_live
        from train.board.run_folder import RunFolder

        return render_live(self.cfg, RunFolder(self.folder), self.data, version)

    def image(self, path: str) -> bytes | None:
        """A PNG of the run by its path below the folder; None for anything else."""
        found = (self.folder / path).resolve()
        inside = found.is_relative_to(self.folder.resolve()) and found.suffix == ".png" and found.is_file()
        return found.read_bytes() if inside else None


class _Handler(BaseHTTPRequestHandler):
    """Answers `/`, `/version`, and `/images/PATH.png`."""

    page: LivePage

    def do_GET(self) -> None:
        host, path = self.headers.get("Host", ""), unquote(urlsplit(self.path).path)
        if host.rpartition(":")[0] not in (HOST, "localhost"):  # another site's page that found its way here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif path == "/":
            self.page.current()
            self.answer(self.page.content, "text/html; charset=utf-8")
        elif path == "/version":
            self.answer(self.page.current().encode(), "text/plain")
        elif path.startswith("/images/") and (content := self.page.image(path.removeprefix("/images/"))) is not None:
            self.answer(content, "image/png", cache="max-age=3600")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def answer(self, content: bytes, kind: str, cache: str = "no-store") -> None:
        """Send it."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", cache)
        self.end_headers()
        with suppress(ConnectionError):  # the browser has gone on
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """A request is no news."""


def serve_report(cfg: ReportRun) -> None:
    """Say the address, and serve until Ctrl+C.

    Raises:
        UserError: the port is taken.
    """
    with suppress(KeyboardInterrupt), server_of(cfg) as server:
        say("report", f"http://{HOST}:{server.server_port} has the page of {cfg.run_dir}; Ctrl+C ends it")
        os.nice(NICENESS)
        server.serve_forever()


def server_of(cfg: ReportRun) -> ThreadingHTTPServer:
    """A server that listens."""
    handler = type("Handler", (_Handler,), {"page": LivePage(cfg)})
    try:
        server = ThreadingHTTPServer((HOST, cfg.port), handler)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port={cfg.port}: another program listens there; set another one, or port=0") from None
        raise UserError(f"port={cfg.port}: cannot listen there ({error.strerror})") from None
    server.daemon_threads = True
    return server

"""Real servers on loopback: HTTP with faults that a test switches on, and S3."""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` maps the name of a file to what goes wrong with it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, str] = {}
        self.requests = Counter[str]()
        self.sent = Counter[str]()  # bytes of content
        self.delay_s = 0.0  # before each answer
        self.busy = self.most_busy = 0  # answers at a time
        self.stopped = threading.Event()
        self.lock = threading.Lock()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        time.sleep(server.delay_s)
        try:
            self._answer()
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self) -> None:
        name, path = self.path.rpartition("/")[2], Path(self.directory) / self.path.strip("/")
        with self.server.lock:
            self.server.requests[name] += 1
        fault = self.server.faults.get(name, "")
        if fault == "500" or (fault == "500 once" and self.server.requests[name] == 1):
            self.send_error(500)
            return
        if not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()
        begin, end = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and fault != "no ranges":
            begin, end = int(asked[1]), int(asked[2]) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
            if fault == "shifted":
                begin, end = begin + 100, end + 100
        else:
            self.send_response(200)
        body = content[begin:end] * (50 if fault == "long" else 1)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault not in ("stall", "cut", "drip"):
            self._send(body)
            return
        self._send(body[:700])
        if fault == "cut":
            self.close_connection = True
        elif fault == "stall":
            self.server.stopped.wait(30)
        else:
            for byte in body[700:]:
                if self.server.stopped.is_set():
                    return
                self._send(bytes([byte]))
                time.sleep(0.05)

    def _send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()
        with self.server.lock:
            self.server.sent[self.path.rpartition("/")[2]] += len(content)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Server]:
    """A server of `tmp_path / "served"`."""
    (tmp_path / "served").mkdir(exist_ok=True)
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()

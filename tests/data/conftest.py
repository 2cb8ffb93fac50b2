"""Real servers on loopback: HTTP with faults that a test switches on, and S3."""

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
        self.stopped = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        fault = self.server.faults.get(name, "")
        if fault == "500" or (fault == "500 once" and self.server.requests[name] == 1):
            self.send_error(500)
        elif fault in ("stall", "cut", "drip"):
            content = (Path(self.directory) / self.path.strip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:700])
            self.wfile.flush()
            if fault == "cut":
                self.close_connection = True
            elif fault == "stall":
                self.server.stopped.wait(30)
            else:
                for byte in content[700:]:
                    if self.server.stopped.is_set():
                        return
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
        else:
            super().do_GET()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Server]:
    """A server of `tmp_path / "served"`."""
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()

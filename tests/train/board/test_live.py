"""The page that follows a run: on loopback only, from before there is anything, made anew no more than it may cost."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conf.entry import compose
from conf.errors import UserError
from conf.schema import ReportRun
from train.board import live
from train.board.live import LivePage, server_of

ROOT = Path(__file__).parents[3]
WAIT_S = 120.0


def options(folder: Path, *line: str) -> ReportRun:
    cfg: ReportRun = compose("report", ReportRun, [f"run_dir={folder}", "live=true", "port=0", *line])
    return cfg


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    with server_of(options(tmp_path / "run")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: ThreadingHTTPServer, path: str, **headers: str) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT_S)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def begin(folder: Path) -> None:
    (folder / "unet/samples").mkdir(parents=True)
    Image.new("RGB", (16, 8)).save(folder / "unet/samples/prompts-000000000100.png")
    (folder / "unet/metrics.jsonl").write_text(json.dumps({"samples_seen": 100, "time": 5, "train/loss": 0.5}) + "\n")


def test_a_run_that_has_not_begun_has_a_page_that_says_so_and_fills(
    served: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    _, empty = get(served, "/")
    assert b"Nothing is there yet" in empty
    before = get(served, "/version")[1]
    assert get(served, "/version")[1] == before
    begin(tmp_path / "run")
    assert get(served, "/version")[1] != before
    _, page = get(served, "/")
    assert b"Nothing is there yet" not in page and b'data-seen="100"' in page
    source = page.decode().partition('<img src="')[2].partition('"')[0]
    answer, content = get(served, f"/{source}")
    assert answer.getheader("Content-Type") == "image/png"
    assert content == (tmp_path / "run/unet/samples/prompts-000000000100.png").read_bytes()


def test_it_listens_to_this_machine_alone(served: ThreadingHTTPServer) -> None:
    assert served.socket.getsockname()[0] == "127.0.0.1"
    assert get(served, "/version", Host=f"localhost:{served.server_port}")[0].status == 200
    assert get(served, "/version", Host="attacker.example:80")[0].status == 403


@pytest.mark.parametrize("path", ["/images/../secret.png", "/images/%2e%2e/secret.png", "/images//etc/passwd", "/x"])
def test_nothing_but_images_of_the_run_is_handed_out(served: ThreadingHTTPServer, tmp_path: Path, path: str) -> None:
    begin(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "run/link.png").symlink_to(tmp_path / "secret.png")
    assert get(served, path)[0].status == 404
    assert get(served, "/images/link.png")[0].status == 404
    assert get(served, "/images/unet/metrics.jsonl")[0].status == 404


def test_making_the_page_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock: dict[str, float] = {"now": 0.0, "cpu": 0.0}
    made = list[float]()

    def make(self: LivePage, version: str) -> str:
        made.append(clock["now"])
        clock["cpu"] += 0.5
        return version

    monkeypatch.setattr(live.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(live.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(LivePage, "render", make)
    page = LivePage(options(tmp_path))
    for second in range(300):
        clock["now"] = float(second)
        monkeypatch.setattr(page, "newest", lambda *_, second=second: f"{second}")
        page.current()
    assert made == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]


def test_a_port_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"port=.*another program"):
        server_of(options(tmp_path, f"port={taken.getsockname()[1]}"))


def test_the_command_says_its_address_first_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, ROOT / "train/report.py", f"run_dir={tmp_path}", "live=true", "port=0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "http://127.0.0.1:" in first
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0 and rest == ""

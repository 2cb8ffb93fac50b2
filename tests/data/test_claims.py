"""Items are worked on once, whoever dies; nothing waits for the dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.claims import Claims

ROOT = Path(__file__).parents[2]
# Works on 30 items, each a file with a line for every worker that finished it.
WORKER = """
import sys, time
from pathlib import Path
from data.claims import Claims
folder = Path(sys.argv[1])
for item in Claims(folder / "claims").work(30, lambda item: (folder / str(item)).exists(), poll_s=0.05):
    time.sleep(0.02)
    with open(folder / f"{item}.log", "a") as log:
        log.write("done\\n")
    (folder / str(item)).touch()
"""


def worker(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], cwd=ROOT)


def test_workers_share_the_items(tmp_path: Path) -> None:
    workers = [worker(tmp_path) for _ in range(4)]
    assert [w.wait(60) for w in workers] == [0] * 4
    assert [(tmp_path / f"{item}.log").read_text() for item in range(30)] == ["done\n"] * 30
    assert not list((tmp_path / "claims").iterdir())


def test_killed_workers_are_replaced_at_once(tmp_path: Path) -> None:
    for _ in range(5):
        victim = worker(tmp_path)
        while not list((tmp_path / "claims").glob("*.claim")):
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    began = time.monotonic()
    assert worker(tmp_path).wait(60) == 0
    assert all((tmp_path / str(item)).exists() for item in range(30))
    assert time.monotonic() - began < 20  # no lease was waited for
    assert not list((tmp_path / "claims").iterdir())


def test_a_claim_is_for_one(tmp_path: Path) -> None:
    with Claims(tmp_path).claim(3) as first, Claims(tmp_path).claim(3) as second, Claims(tmp_path).claim(4) as other:
        assert (first, second, other) == (True, False, True)
    with Claims(tmp_path).claim(3) as again:
        assert again


@pytest.mark.parametrize(("age_s", "taken"), [(5.0, False), (200.0, True)])
def test_a_claim_from_another_machine_holds_while_it_shows_life(tmp_path: Path, age_s: float, taken: bool) -> None:
    claim = tmp_path / "00000.0.claim"
    claim.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "born": "1"}))
    seen = time.time() - age_s
    os.utime(claim, (seen, seen))
    with Claims(tmp_path, lease_s=120).claim(0) as ours:
        assert ours is taken


def test_an_item_whose_work_failed_is_free_again(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), Claims(tmp_path).claim(0):
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_workers_that_are_late_find_the_folder_removed_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each moment: before they make it, while they make it and what lies above it, and when they claim."""
    done = list[bool]()

    def removed(path: Path, *options: object, **others: object) -> None:
        done.append(True)
        raise FileNotFoundError(path)

    claims = Claims(tmp_path / "parts" / "merge")
    assert list(claims.work(1, lambda _: True)) == [] and not claims.folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", removed)
        assert list(claims.work(1, lambda _: bool(done))) == []
    asked = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", lambda *_, **__: None)
        assert list(claims.work(1, lambda _: next(asked), poll_s=0.01)) == []

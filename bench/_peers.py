"""Libraries that want other versions of our dependencies than we do, each in a process that answers when it is asked.

They get a virtual environment in the cache folder of the user, which is made at the first run.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

PEERS = ("mosaicml-streaming", "litdata")
ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentline" / "bench-latent-loading"


def environment() -> Path:
    """Python of the peers' environment, which sees our torch and has its own everything else."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        here = ENVIRONMENT / "lib" / version / "site-packages" / "ours.pth"
        here.write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True, stderr=subprocess.DEVNULL)
        (ENVIRONMENT / "complete").touch()
    return python


class Peer:
    """Records per second of a library's epochs; `script` writes `source` to `folder` in its format and reads it."""

    def __init__(self, script: str, source: Path, folder: Path, *options: str) -> None:
        command = [str(environment()), str(Path(__file__).with_name(script))]
        subprocess.run([*command, "write", str(source), str(folder), *options], check=True)
        self.process = subprocess.Popen(
            [*command, "read", str(folder), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("epoch\n")
        self.process.stdin.flush()
        count, seconds = self.process.stdout.readline().split()
        return int(count) / float(seconds)

"""How a command ends: with what it found, or with one line that a person can act on."""

import errno
import os
import sys
from contextlib import suppress
from typing import NoReturn

from conf.errors import first_line
from conf.files import atomic_write
from conf.plain_json import dumps

OUTCOME = "LATENTLINE_OUTCOME"  # variable with the file in which a member of a sweep leaves its objective or error


def tell(**outcome: object) -> None:
    """Leave the outcome for the sweep that started this command, if there is one."""
    if OUTCOME in os.environ:
        atomic_write(os.environ[OUTCOME], dumps(outcome).encode())


def fail(error: Exception) -> NoReturn:
    """End the command with one line that a person can act on."""
    if os.environ.get("LATENTLINE_TRACEBACK"):
        raise error
    message = first_line(error)
    if isinstance(error, OSError) and error.strerror:
        where = f" '{error.filename}'" if error.filename else ""
        message = f"{error.strerror}{where}: {remedy(error)}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    with suppress(OSError):  # the disk may be what failed
        tell(error=message)
    if "RANK" in os.environ:
        leave(2)
    sys.exit(2)


def leave(status: int) -> NoReturn:
    """End one of several processes at once.

    No process group that still waits for this rank keeps it alive, and no thread of torch meets an interpreter that is
    being torn down, which aborts the process now and then after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def remedy(error: OSError) -> str:
    remedies = {
        errno.ENOSPC: "free some space or set run_dir= to another disk; what was complete is kept",
        errno.EDQUOT: "your quota is used up: free some space or set run_dir= to another disk",
        errno.EFBIG: "larger than the largest file allowed here (ulimit -f, or the disk's own limit): raise it",
        errno.EACCES: "no permission: set run_dir= (or output_dir=) to a folder that you may write",
        errno.EPERM: "no permission: set run_dir= (or output_dir=) to a folder that you may write",
        errno.EROFS: "a read-only disk: set run_dir= (or output_dir=) to a folder that you may write",
        errno.ENOENT: "check the path in the options",
        errno.ENOTDIR: "a file stands where a folder is needed: set run_dir= (or output_dir=) to another path",
    }
    return remedies.get(error.errno or 0, "check the disk and the paths in the options")

"""Remote shards on the local disk: whole, checked, shared by the processes of a machine, and no more than allowed."""

import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conf.errors import UserError
from conf.files import atomic_path, sha256
from conf.process import wait_for_lock
from conf.schema import StreamConfig
from data.shards.remote import RemoteError, fetch, joined
from data.shards.shard import ShardInfo
from data.shards.tar_index import cache_top


class ShardCache:
    """The shards of one remote folder.

    A shard that makes room stays readable for those who have it mapped. A download is done by one process while the
    others wait for it; if that process is killed, the kernel lets the next one try.
    """

    def __init__(self, url: str, stream: StreamConfig) -> None:
        self.url, self.limit, self.timeout_s = url, int(stream.cache_gb * 1e9), stream.timeout_s
        self.top = cache_top(stream.cache_dir)
        self.folder = self.top / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._ahead: threading.Thread | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_ahead": None}  # a thread stays where it is

    def path_of(self, info: ShardInfo) -> Path:
        """Path of a shard on the local disk, fetched if need be; `UserError` when it cannot be had."""
        path = self.folder / f"{info.sha256[:16]}-{info.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            while True:
                with self._locked(path):
                    if not path.exists():
                        self._download(info, path)
                with suppress(FileNotFoundError):  # it has made room for another process's shard at once
                    os.utime(path)  # the least recently used makes room first
                    return path
        except OSError as error:
            raise UserError(
                f"shard {joined(self.url, info.name)} cannot be kept in {self.top} ({error.strerror}): set "
                "stream.cache_dir to a disk with room, or lower stream.cache_gb"
            ) from None

    def prefetch(self, infos: Iterable[ShardInfo]) -> None:
        """Fetch shards in the background, unless that is going on; what fails is told when it is needed."""
        if self._ahead is None or not self._ahead.is_alive():
            missing = [i for i in infos if not (self.folder / f"{i.sha256[:16]}-{i.name}").exists()]
            self._ahead = threading.Thread(target=self._fetch_all, args=(missing,), daemon=True)
            self._ahead.start()

    def _fetch_all(self, infos: list[ShardInfo]) -> None:
        for info in infos:
            with suppress(UserError):
                self.path_of(info)

    def _download(self, info: ShardInfo, path: Path) -> None:
        self._make_room(info.bytes)
        try:
            self._fetch(info, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._make_room(self.limit)  # others use the disk too: give back all of ours
            self._fetch(info, path)

    def _fetch(self, info: ShardInfo, path: Path) -> None:
        """Fetch and check; what arrives damaged is fetched once more."""
        url = str(joined(self.url, info.name))
        for _ in range(2):
            with suppress(_DamagedError), atomic_path(path) as temporary:
                fetch(url, temporary, self.timeout_s)
                if temporary.stat().st_size != info.bytes or (info.sha256 and sha256(temporary) != info.sha256):
                    raise _DamagedError
                return
        raise RemoteError(f"shard {url} is not the one that its manifest describes (size or sha256): upload it again")

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards, of all data sets, until `size` bytes fit below the limit."""
        kept = []
        for path in self.top.glob("*/*.tar"):
            with suppress(FileNotFoundError):  # another process was faster
                status = path.stat()
                kept.append((status.st_mtime, status.st_size, path))
        used = sum(bytes_ for _, bytes_, _ in kept)
        for _, bytes_, path in sorted(kept):
            if used + size <= self.limit:
                return
            path.unlink(missing_ok=True)  # who has it mapped reads on: its blocks go with the last map
            used -= bytes_

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        # The kernel frees this lock when its process is killed. Its file stays: were it removed while another process
        # waits for it, that one would get a lock which later ones do not see.
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            wait_for_lock(descriptor)
            yield
        finally:
            os.close(descriptor)


class _DamagedError(Exception):
    """A file arrived in another form than expected."""

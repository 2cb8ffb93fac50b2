"""Remote shards on the local disk: whole, checked, shared by the processes of a machine, and no more than allowed."""

import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from conf.errors import UserError
from conf.files import atomic_write, publish
from conf.process import lock, wait_for_lock
from conf.schema import StreamConfig
from data.shards.remote import RemoteError, WrongContentError, fetch, joined, read_remote
from data.shards.shard import ShardInfo
from data.shards.tar_index import ShardIndex, cache_top, index_name, map_file

OURS = "[0-9a-f]" * 16  # how names of folders and files begin, as patterns see them


class ShardCache:
    """The shards of one remote folder, and their indices.

    A shard that makes room stays readable for those who have it mapped. A transfer is done by one process while the
    others go on with another shard, or wait for it if they need this one; if that process is killed, the kernel lets
    the next one try. What is fetched ahead takes at most `stream.transfers` transfers of a machine.
    """

    def __init__(self, url: str, stream: StreamConfig) -> None:
        self.url, self.limit, self.timeout_s = url, int(stream.cache_gb * 1e9), stream.timeout_s
        self.transfers = stream.transfers
        self.top = cache_top(stream.cache_dir)
        self.folder = self.top / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._forget()

    def _forget(self) -> None:
        self._wanted: list[ShardInfo] = []  # ahead of time, the most urgent first
        self._ahead: list[threading.Thread] = []
        self._guard = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_wanted", "_ahead", "_guard")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget()  # threads and locks stay where they are

    @contextmanager
    def path_of(self, info: ShardInfo) -> Iterator[Path]:
        """Path of a shard on the local disk, fetched if need be; inside the block it makes room for no other one.

        Raises:
            UserError: it cannot be had.
        """
        path = self._place(info)
        with ExitStack() as stack:
            with self._told(info.name):
                file = stack.enter_context(self._held(path))
                if not lock(file):
                    wait_for_lock(file)
                if not path.exists():
                    self._transfer(info, path)
                os.utime(path)  # the least recently used makes room first
            yield path

    def index_of(self, info: ShardInfo) -> ShardIndex:
        """Index of a shard, which need not be here itself; `UserError` when it cannot be had."""
        name, of = index_name(info.name), {"bytes": info.bytes, "sha256": info.sha256}
        path, url = self._place(info).with_suffix(".idx"), joined(self.url, name)
        with suppress(UserError):  # not here, or it has made room
            if index := ShardIndex.loads(map_file(path), of):
                return index
        try:
            content = read_remote(url, self.timeout_s)
        except FileNotFoundError:
            raise RemoteError(f"{url}: not found: upload the whole folder that the shards were made in") from None
        index = ShardIndex.loads(memoryview(content), of)
        if index is None or hashlib.sha256(content).hexdigest() != info.index:
            raise RemoteError(f"{url} is not the index that its manifest names: upload it again")
        with self._told(name):
            atomic_write(path, content)
        return index

    def prefetch(self, infos: Iterable[ShardInfo]) -> None:
        """Fetch shards in the background, these in place of those of before; what fails is told when it is needed."""
        missing = [info for info in infos if not self._place(info).exists()]
        with self._guard:
            self._wanted = missing
            self._ahead = [thread for thread in self._ahead if thread.is_alive()]
            for _ in range(min(self.transfers, len(missing)) - len(self._ahead)):
                self._ahead.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._ahead[-1].start()

    def _fetch_ahead(self) -> None:
        with suppress(OSError, UserError), self._slot() as free:
            while free and (info := self._next()):
                path = self._place(info)
                with suppress(OSError, UserError), self._held(path) as file:
                    if lock(file) and not path.exists():  # else another process is at it: there is a next one
                        self._transfer(info, path)

    def _next(self) -> ShardInfo | None:
        with self._guard:
            return self._wanted.pop(0) if self._wanted else None

    @contextmanager
    def _slot(self) -> Iterator[bool]:
        """One of the transfers that this machine may do ahead, or False where others are doing them all."""
        with ExitStack() as stack:
            for number in range(self.transfers):
                if lock(stack.enter_context(self._held(self.top / f"transfer-{number}"))):
                    yield True
                    return
            yield False

    def _place(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256[:16]}-{info.name}"

    def _transfer(self, info: ShardInfo, path: Path) -> None:
        try:
            self._fetch(info, path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._reserve(path, self.limit)  # others use the disk too: give back all of ours
            self._fetch(info, path)

    def _fetch(self, info: ShardInfo, path: Path) -> None:
        """Fetch and check; what arrives damaged is fetched once more."""
        url, part = str(joined(self.url, info.name)), _part(path)
        try:
            for _ in range(2):
                self._reserve(path, info.bytes)
                with suppress(WrongContentError):
                    fetch(url, part, self.timeout_s, info.bytes, info.sha256)
                    if info.index:
                        with suppress(RemoteError):  # the shard alone says all that its index does
                            self.index_of(info)
                    publish(part, path)
                    return
        finally:
            part.unlink(missing_ok=True)
        raise RemoteError(f"shard {url} is not the one that its manifest describes (size or sha256): upload it again")

    def _reserve(self, path: Path, size: int) -> None:
        """Take `size` bytes of the limit; the least recently used shards, of all data sets, make room for them."""
        with self._held(self.top / "room") as file:
            if not lock(file):
                wait_for_lock(file)
            kept = []
            for name in (f"{OURS}-*.tar", f"{OURS}-*.idx", f".{OURS}-*.part"):  # the folder may hold the user's own
                for other in self.top.glob(f"{OURS}/{name}"):
                    with suppress(FileNotFoundError):  # another process was faster
                        status = other.stat()
                        kept.append((status.st_mtime, status.st_size, other))
            used = sum(bytes_ for _, bytes_, other in kept if other != _part(path))
            for used_at, bytes_, other in sorted(kept):
                if used + size <= self.limit:
                    break
                if other != _part(path) and self._made_room(other, used_at):
                    used -= bytes_
            with open(_part(path), "wb") as reserved:
                reserved.truncate(min(size, self.limit))  # a file with a hole: it counts, and takes no room

    def _made_room(self, other: Path, used_at: float) -> bool:
        """Remove a file, unless somebody fetches or opens it at this moment, or has since we looked."""
        whole = other.with_name(other.name[1 : -len(".part")]) if other.suffix == ".part" else other
        with self._held(whole) as file:
            if not lock(file) or not other.exists() or other.stat().st_mtime != used_at:
                return False
            other.unlink()  # who has it mapped reads on: its blocks go with the last map
            return True

    @contextmanager
    def _held(self, path: Path) -> Iterator[int]:
        """A file to lock, which is freed at the end of the block, or by the kernel when the process is killed."""
        # The file stays: were it removed while another process waits for it, that one would get a lock which later
        # ones do not see.
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"shard {joined(self.url, name)} cannot be kept in {self.top} ({error.strerror}): set "
                "stream.cache_dir to a disk with room, or lower stream.cache_gb"
            ) from None


def _part(path: Path) -> Path:
    """A shard on its way; its name is known, so that what a killed process has left is written anew."""
    return path.with_name(f".{path.name}.part")

"""Files behind http(s):// and s3:// through fsspec, with time limits: nothing here waits without end."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from conf.errors import UserError

TRIES = 4
PAUSE_S = 1.0  # before the second try; doubled before each further one
CHUNK = 1 << 20  # bytes per read
SLOWEST = 1024  # bytes/s, over a time limit, below which a server counts as stuck
Result = TypeVar("Result")


class RemoteError(UserError):
    """A file that could not be fetched, and why."""


class WrongContentError(Exception):
    """A file that arrived, and is not the one that was wanted."""


def is_remote(path: str | Path) -> bool:
    """Whether a path is an address."""
    return "://" in str(path)


def joined(folder: str | Path, name: str) -> str | Path:
    """A name inside a folder, which may be an address."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else Path(folder) / name


def listed(url: str, pattern: str = "*.tar", timeout_s: float = 60.0) -> list[str]:
    """Addresses of the files in a folder whose names match, sorted; `RemoteError` where the server does not list."""
    scheme = url.partition("://")[0]
    try:
        found = _file_system(scheme, timeout_s).ls(url.rstrip("/") + "/", detail=False)
    except Exception as error:  # each protocol has errors of its own
        reason = _reason(error, timeout_s)
        raise RemoteError(f"{url} cannot be listed ({reason}): name the files, as in {url}/{{000..099}}.tar") from None
    names = [name if "://" in name else f"{scheme}://{name}" for name in found]
    return sorted(name for name in names if fnmatch(name.rpartition("/")[2], pattern))


def fetch(url: str, target: Path, timeout_s: float, size: int | None = None, digest: str = "") -> None:
    """Copy a remote file; a server that fails is asked again.

    Args:
        size: in bytes; None: not known. A file of that size is there to be written over.
        digest: sha256 in hex; empty: not known.

    Raises:
        RemoteError: not there, an error of the server, or no byte (or hardly any) for `timeout_s` seconds.
        WrongContentError: what came has another size or digest.
        OSError: the local disk.
    """

    def copy() -> None:
        found = hashlib.sha256()
        with open(target, "wb" if size is None else "r+b") as file:
            for chunk in _chunks(url, timeout_s):
                file.write(chunk)
                found.update(chunk)
                if size is not None and file.tell() > size:  # a server that sends for ever shall not fill the disk
                    raise WrongContentError(url)
            if (size is not None and file.tell() != size) or (digest and found.hexdigest() != digest):
                raise WrongContentError(url)

    _tried(copy)


def fetch_ranges(places: Sequence[tuple[str, int, int]], timeout_s: float) -> list[bytes]:
    """Parts of remote files, several at once: (address, first byte, the one behind the last) of each.

    Raises:
        RemoteError: as `fetch`; also by a server that sends other parts than it was asked for.
    """
    arrived = dict[int, bytes]()  # by place: what failed is asked for again, and nothing else

    def get() -> None:
        missing = [number for number in range(len(places)) if number not in arrived]
        urls, begins, ends = (list(column) for column in zip(*(places[number] for number in missing), strict=True))
        files, failed = _file_system(urls[0].partition("://")[0], timeout_s), list[tuple[str, Exception]]()
        found = files.cat_ranges(urls, begins, ends, on_error="return")
        for number, url, begin, end, part in zip(missing, urls, begins, ends, found, strict=True):
            if isinstance(part, Exception):
                failed.append((url, part))
            elif len(part) != end - begin:
                raise RemoteError(
                    f"{url}: the server sent {len(part)} bytes for a range of {end - begin}, it cannot give parts of a "
                    "file: set stream.window, so that whole shards are fetched, or more stream.cache_gb"
                )
            else:
                arrived[number] = part
        for url, error in failed:
            raise RemoteError(f"{url}: {_reason(error, timeout_s)}") from error

    _tried(get)
    return [arrived[number] for number in range(len(places))]


def read_remote(path: str | Path, timeout_s: float = 60.0) -> bytes:
    """Content of a small file, local or remote; `FileNotFoundError` when there is none."""
    if not is_remote(path):
        return Path(path).read_bytes()
    try:
        return _tried(lambda: b"".join(_chunks(str(path), timeout_s)))
    except RemoteError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(path) from None
        raise


def _tried(work: Callable[[], Result]) -> Result:
    """Result of work that fails now and then, tried several times."""
    for pause in range(TRIES - 1):
        try:
            return work()
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(PAUSE_S * 2**pause)
    return work()


def _chunks(url: str, timeout_s: float) -> Iterator[bytes]:
    """The content of a file in pieces; every failure of the other side is a `RemoteError`."""
    try:
        # 0: a stream, no requests of ranges. With any size the server is not asked for it first, a way there and back.
        options = {"block_size": 0, "size": 1} if url.startswith("http") else {}
        with _file_system(url.partition("://")[0], timeout_s).open(url, "rb", **options) as file:
            mark, arrived = time.monotonic(), 0
            while chunk := file.read(CHUNK):
                arrived += len(chunk)
                if (now := time.monotonic()) - mark > timeout_s:
                    if arrived < timeout_s * SLOWEST:
                        raise TimeoutError
                    mark, arrived = now, 0
                yield chunk
    except (GeneratorExit, UserError):
        raise
    except Exception as error:
        raise RemoteError(f"{url}: {_reason(error, timeout_s)}") from error


def _file_system(scheme: str, timeout_s: float) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=timeout_s, sock_read=timeout_s)}}
        elif scheme == "s3":
            limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"max_attempts": 1}}
            options = {"config_kwargs": limits, "use_listings_cache": False}
            if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
                options["endpoint_url"] = endpoint
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{scheme}:// cannot be read ({error}): pip install 'latentline[remote]'") from None


def _reason(error: Exception, timeout_s: float = 0.0) -> str:
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, TimeoutError):
        return f"the server was silent or stuck for {timeout_s:g} s (timeout_s)"
    status, message = getattr(error, "status", ""), getattr(error, "message", str(error))
    return f"{status} {message}".strip().splitlines()[0] if f"{status}{message}".strip() else type(error).__name__

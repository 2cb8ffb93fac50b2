"""The latent record: moments of the autoencoder's posterior, tokens and text states of one image, in a shard.

`KEY.moments.npy` [variants, 2·C, h, w] (mean, then log-variance), where captions are a condition `KEY.tokens.npy` [L]
int32 and mostly `KEY.text.npy` [L, D], both with an axis before those where there are several captions of each image,
of each other condition its arrays `KEY.NAME.npy` [variants, ...], `KEY.txt` (the first caption), `KEY.json`.
bfloat16, which npy does not know, is stored as its bits in uint16.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from conf.errors import UserError
from conf.plain_json import dumps
from conf.schema import CacheDtype
from data.captions import decode_text
from data.samples import fields_of
from data.shards.shard import Buffer, ShardInfo, ShardWriter, without_dots

LOGVAR_RANGE = (-30.0, 20.0)  # of the log-variance, as diffusers clamps it


@dataclass(kw_only=True, slots=True)
class LatentRecord:
    """One decoded record; the arrays are views of the shard, in the cache's dtype (bf16: as uint16 bits)."""

    key: str
    moments: np.ndarray  # [variants, 2·C, h, w]
    tokens: np.ndarray | None  # [L] int32
    text: np.ndarray | None  # [L, D]
    arrays: dict[str, np.ndarray]  # of other conditions [variants, ...]
    caption: str
    meta: dict[str, Any]


class LatentWriter:
    """Writes latent records into shards; close and failure as `ShardWriter`."""

    def __init__(
        self, folder: str | Path, shard_samples: int, dtype: CacheDtype, first_shard: int = 0, suffix: str = ""
    ) -> None:
        self.dtype = dtype
        self.shards = ShardWriter(folder, shard_samples, first_shard, suffix)

    def add(
        self,
        key: str,
        moments: np.ndarray,  # [variants, 2·C, h, w] float32
        tokens: np.ndarray | None,  # [L] integers
        caption: str,
        meta: Mapping[str, Any],
        text: np.ndarray | None = None,  # [L, D] float32
        arrays: Mapping[str, np.ndarray] | None = None,  # of other conditions [variants, ...], kept as they are
    ) -> None:
        """Append one record; `UserError` when a value does not fit the cache's dtype."""
        files: dict[str, Buffer] = {"moments.npy": encode_npy(self._cast(key, moments))}
        if tokens is not None:
            files["tokens.npy"] = encode_npy(tokens.astype(np.int32))
        if text is not None:
            files["text.npy"] = encode_npy(self._cast(key, text))
        files |= {f"{name}.npy": encode_npy(array) for name, array in (arrays or {}).items()}
        files["txt"] = caption.encode()
        files["json"] = dumps(meta, sort_keys=True).encode()
        self.shards.add(without_dots(key), files)

    def close(self) -> list[ShardInfo]:
        """Finish the last shard; return what this writer wrote."""
        return self.shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shards.__exit__(kind, error, trace)

    def _cast(self, key: str, values: np.ndarray) -> np.ndarray:
        largest = np.abs(values).max()  # of NaN: NaN, which the comparison refuses too
        if not largest <= (65504 if self.dtype is CacheDtype.fp16 else 3e38):
            raise UserError(
                f"sample '{key}': a value of {largest} does not fit dtype={self.dtype.value}: set dtype=fp32"
            )
        if self.dtype is CacheDtype.bf16:
            return _bf16_bits(values)
        return values.astype(np.float16 if self.dtype is CacheDtype.fp16 else np.float32)


def read_latent(record: Mapping[str, Any]) -> LatentRecord:
    """Decode what `ShardReader` gives for one sample; `UserError` when it is not a latent record."""
    if "moments.npy" not in record:
        raise UserError(f"sample '{record['__key__']}' is not a latent record: run data/precompute_latents.py again")
    arrays = {name.removesuffix(".npy"): decode_npy(record[name]) for name in record if name.endswith(".npy")}
    return LatentRecord(
        key=record["__key__"],
        moments=arrays.pop("moments"),
        tokens=arrays.pop("tokens", None),
        text=arrays.pop("text", None),
        arrays=arrays,
        caption=decode_text(record.get("txt", b"")),
        meta=fields_of(record),
    )


def as_float32(values: np.ndarray) -> np.ndarray:
    """Cached values, of any cache dtype, as float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def encode_npy(values: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def decode_npy(content: Buffer) -> np.ndarray:
    """A .npy file as a read-only view of `content`; `UserError` for object arrays and anything that is not .npy."""
    start = 10 + content[8] + 256 * content[9] if len(content) > 10 else 0
    dtype, shape, size = _npy_header(bytes(content[:start]))
    if len(content) - start != size:
        raise UserError(
            f"an .npy member has {len(content) - start} bytes of data, not {size}: run the precompute again"
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape)


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Parse a header once: all records of a cache share it. Returns dtype, shape, bytes of data."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        raise UserError("an .npy member has no readable header: run the precompute again") from None
    if dtype.hasobject or fortran:
        raise UserError("an .npy member holds objects or Fortran order: run the precompute again")
    return dtype, shape, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round finite float32 to bfloat16, to nearest and ties to even; the bits as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class ChannelStats:
    """Mean and standard deviation, per channel, of latents z ~ N(mean, exp(logvar)), over a whole data set.

    Streaming and mergeable (Chan, Golub, LeVeque 1979, eq. 2.1). The spread of z is in closed form that of the means
    plus the mean of the variances, so no noise is drawn.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # values per channel
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)  # summed squared distance from the mean

    def add(self, moments: np.ndarray) -> None:
        """Take in moments [..., 2·C, h, w] (mean, then log-variance)."""
        mean, logvar = np.split(moments.astype(np.float64), 2, axis=-3)
        others = tuple(axis for axis in range(mean.ndim) if axis != mean.ndim - 3)
        part = ChannelStats(len(self.mean))
        part.count = mean.size // len(self.mean)
        part.mean = mean.mean(axis=others)
        part.squares = mean.var(axis=others) * part.count + np.exp(logvar.clip(*LOGVAR_RANGE)).sum(axis=others)
        self.merge(part)

    def merge(self, other: "ChannelStats") -> None:
        """Take in what another instance (of another rank or shard) has seen."""
        total = self.count + other.count
        if total == 0:
            return
        delta = other.mean - self.mean
        self.squares += other.squares + delta**2 * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.count = total

    def result(self) -> dict[str, list[float]]:
        """{"mean": [C], "std": [C]}, for the manifest's stats."""
        return {"mean": self.mean.tolist(), "std": np.sqrt(self.squares / max(self.count, 1)).tolist()}

    def state(self) -> dict[str, Any]:
        """Plain values to continue from, or to merge on another machine."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "ChannelStats":
        """Counterpart of `state`."""
        stats = cls(len(state["mean"]))
        stats.count, stats.mean, stats.squares = state["count"], np.array(state["mean"]), np.array(state["squares"])
        return stats

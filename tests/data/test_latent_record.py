"""The latent record: what is written is read, in every cache dtype, and its statistics are those of the whole."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.errors import UserError
from conf.schema import CacheDtype, StreamConfig
from data.latent_record import ChannelStats, LatentWriter, as_float32, decode_npy, encode_npy, read_latent
from data.shards.manifest import Manifest
from data.shards.shard import ShardReader, without_dots
from data.shards.store import RecordStore

RANDOM = np.random.default_rng(0)
MOMENTS = RANDOM.normal(size=(2, 8, 4, 6)).astype(np.float32) * 10
TOKENS = np.arange(77)
TEXT = RANDOM.normal(size=(77, 16)).astype(np.float32)


@pytest.mark.parametrize(
    "dtype, tolerance", [(CacheDtype.fp32, 0.0), (CacheDtype.fp16, 2**-11), (CacheDtype.bf16, 2**-8)]
)
def test_record_round_trip(tmp_path: Path, dtype: CacheDtype, tolerance: float) -> None:
    with LatentWriter(tmp_path, 10, dtype) as writer:
        writer.add("000000007", MOMENTS, TOKENS, "a réd planet", {"size": [3, 4]}, TEXT)
    record = read_latent(ShardReader(tmp_path / "00000.tar")[0])
    assert (record.key, record.caption, record.meta) == ("000000007", "a réd planet", {"size": [3, 4]})
    assert record.text is not None and record.tokens.dtype == np.int32
    np.testing.assert_array_equal(record.tokens, TOKENS)
    np.testing.assert_allclose(as_float32(record.moments), MOMENTS, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(as_float32(record.text), TEXT, rtol=tolerance, atol=tolerance)


def test_record_without_text_states(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, 10, CacheDtype.fp16) as writer:
        writer.add("0", MOMENTS, TOKENS, "", {})
    assert read_latent(ShardReader(tmp_path / "00000.tar")[0]).text is None


def test_bf16_rounds_as_torch(tmp_path: Path) -> None:
    values = np.concatenate([RANDOM.normal(size=500), [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3e38]])
    moments = values.astype(np.float32).reshape(1, -1, 1, 1)
    with LatentWriter(tmp_path, 10, CacheDtype.bf16) as writer:
        writer.add("0", moments, TOKENS, "", {})
    stored = read_latent(ShardReader(tmp_path / "00000.tar")[0]).moments
    np.testing.assert_array_equal(as_float32(stored), torch.from_numpy(moments).bfloat16().float().numpy())


def test_arrays_are_views_that_numpy_reads_too(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, 10, CacheDtype.fp16) as writer:
        writer.add("0", MOMENTS, TOKENS, "", {})
    record = ShardReader(tmp_path / "00000.tar")[0]
    moments = decode_npy(record["moments.npy"])
    assert not moments.flags.owndata and not moments.flags.writeable
    assert moments.ctypes.data % 64 == 0  # aligned, so that no copy is needed
    np.testing.assert_array_equal(moments, np.load(io.BytesIO(record["moments.npy"]), allow_pickle=False))


@pytest.mark.parametrize("key", ["k" * 187, "a.b/22.05", "/ключ" * 40, "a~2"])
def test_keys_of_foreign_shards_are_kept_apart_and_arrays_stay_aligned(tmp_path: Path, key: str) -> None:
    with LatentWriter(tmp_path, 10, CacheDtype.fp16) as writer:
        for name in (key, f"{key}x", f"{key}.x"):
            writer.add(name, MOMENTS, TOKENS, name, {})
    manifest = Manifest(kind="latents", shards=writer.close())
    records = RecordStore(tmp_path, manifest, [("moments.npy",)], StreamConfig())
    assert len({records[index]["__key__"] for index in range(3)}) == 3
    for index, name in enumerate((key, f"{key}x", f"{key}.x")):
        record = read_latent(records[index])
        assert record.caption == name and record.moments.ctypes.data % 64 == 0
        assert records.find(0, without_dots(name)) == index


@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, value: float) -> None:
    moments = MOMENTS.copy()
    moments[0, 0, 0, 0] = value
    with pytest.raises(UserError, match="dtype=fp16"), LatentWriter(tmp_path, 10, CacheDtype.fp16) as writer:
        writer.add("0", moments, TOKENS, "", {})
    assert list(tmp_path.iterdir()) == []


def test_hostile_npy_is_refused() -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    whole = encode_npy(MOMENTS)
    broken = [pickled.getvalue(), b"", b"\x93NUMPY", b"x" * 200, whole[:-1], whole + b"\0", whole[:60]]
    broken.append(whole.replace(b"'fortran_order': False", b"'fortran_order': True "))
    for content in broken:
        with pytest.raises(UserError, match=r"\.npy member"):
            decode_npy(content)


def test_another_record_is_refused() -> None:
    with pytest.raises(UserError, match="'7' is not a latent record"):
        read_latent({"__key__": "7", "png": b""})


def test_streaming_statistics_equal_numpy_over_the_whole() -> None:
    moments = RANDOM.normal(size=(50, 8, 4, 6)) * 3 + np.arange(8)[:, None, None]
    mean, logvar = moments[:, :4], moments[:, 4:]
    ranks = [ChannelStats(4) for _ in range(3)]
    for rank, stats in enumerate(ranks):
        for start in range(3 * rank, 50, 9):
            stats.add(moments[start : start + 3])
    total = ChannelStats(4)
    for stats in ranks:
        total.merge(stats)
    result = total.result()
    assert total.count == 50 * 24
    np.testing.assert_allclose(result["mean"], mean.mean(axis=(0, 2, 3)), rtol=1e-12)
    spread = np.sqrt(mean.var(axis=(0, 2, 3)) + np.exp(logvar).mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(result["std"], spread, rtol=1e-12)


def test_statistics_are_those_of_sampled_latents_and_stable_far_from_zero() -> None:
    mean = RANDOM.normal(size=(200, 2, 16, 16)) + 1e6
    logvar = np.full_like(mean, np.log(0.25))
    stats = ChannelStats(2)
    for start in range(0, 200, 7):
        stats.add(np.concatenate([mean, logvar], axis=1)[start : start + 7])
    drawn = mean + 0.5 * RANDOM.normal(size=mean.shape)
    np.testing.assert_allclose(stats.result()["std"], drawn.std(axis=(0, 2, 3)), rtol=0.01)


def test_statistics_of_nothing_are_zero() -> None:
    stats = ChannelStats(2)
    stats.merge(ChannelStats(2))
    assert stats.result() == {"mean": [0.0, 0.0], "std": [0.0, 0.0]}

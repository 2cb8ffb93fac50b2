"""Aspect buckets: which shapes there are, and an order of runs that loses and repeats nothing."""

from collections import Counter
from functools import partial

import pytest

from conf.schema import StreamConfig
from data.buckets import BucketedOrder, BucketOrder, bucket_of, bucket_shapes, nearest_shape, suffix_of
from data.image_dataset import order_of


def test_shapes_have_the_area_and_the_aspects_that_were_asked_for() -> None:
    assert bucket_shapes(512, 1.0, 64) == [(512, 512)]
    shapes = bucket_shapes(1024, 2.0, 64)
    assert len(shapes) > 10 and (1024, 1024) in shapes and len(set(shapes)) == len(shapes)
    for width, height in shapes:
        assert width % 64 == height % 64 == 0 and 0.85 * 1024**2 <= width * height <= 1024**2
        assert max(width, height) <= 2 * min(width, height) and (height, width) in shapes


def test_a_image_goes_where_it_loses_least() -> None:
    shapes = bucket_shapes(512, 2.0, 64)
    assert nearest_shape(1000, 1000, shapes) == (512, 512)
    width, height = nearest_shape(1920, 1080, shapes)
    assert abs(width / height - 16 / 9) == min(abs(w / h - 16 / 9) for w, h in shapes)
    assert nearest_shape(1, 10_000, shapes) == min(shapes, key=lambda shape: shape[0] / shape[1])


def test_the_bucket_stands_in_the_name_of_the_shard() -> None:
    assert bucket_of(f"00012{suffix_of((768, 512))}.tar") == "-768x512"
    assert bucket_of("00012.tar") == bucket_of("laion-768x512.tar") == ""


@pytest.mark.parametrize(("sizes", "run"), [([100, 37, 5], 8), ([64], 16), ([9, 9, 9], 32), ([1000, 1], 4)])
def test_every_sample_comes_once_per_epoch_of_its_bucket(sizes: list[int], run: int) -> None:
    order, epochs = BucketOrder(0, sizes, run), 40
    runs = sum(epochs * size // run for size in sizes)
    streams: list[list[int]] = [[] for _ in sizes]
    for number in range(runs):
        group, *others = {order(number * run + offset)[0] for offset in range(run)}
        assert not others, "a run is of one bucket"
        streams[group] += [order(number * run + offset)[1] for offset in range(run)]
    for stream, size in zip(streams, sizes, strict=True):
        assert sorted(stream) == list(range(epochs * size // run * run)), "each position of the bucket's stream once"


def test_no_bucket_runs_ahead_of_its_share() -> None:
    sizes, run = [500, 300, 30], 10
    order, seen = BucketOrder(3, sizes, run), Counter[int]()
    per_epoch = sum(sizes)
    for position in range(5 * per_epoch):
        seen[order(position)[0]] += 1
        if (position + 1) % per_epoch == 0:
            epoch = (position + 1) // per_epoch
            assert all(abs(seen[group] - epoch * size) <= run for group, size in enumerate(sizes))
    first = [order(position)[0] for position in range(0, per_epoch, run)]
    assert first[:20] != sorted(first[:20]), "the runs of an epoch are shuffled"


@pytest.mark.parametrize("window", [0, 2])
def test_positions_lead_to_samples_of_the_right_shards(window: int) -> None:
    sizes, buckets = [10, 7, 12, 3, 20, 8], ["-a", "-b", "-a", "-b", "-a", "-a"]
    order = BucketedOrder(0, sizes, buckets, partial(order_of, 0, stream=StreamConfig(window=window)), run=5)
    of_sample = [name for size, name in zip(sizes, buckets, strict=True) for _ in range(size)]
    seen = Counter[int]()
    for start in range(0, 50 * 60, 5):
        indices = [order(position) for position in range(start, start + 5)]
        assert len({of_sample[index] for index in indices}) == 1
        seen.update(indices)
    assert set(seen) == set(range(60)) and max(seen.values()) - min(seen.values()) <= 1

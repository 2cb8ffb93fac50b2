"""The order: a permutation per epoch, a pure function of (seed, position), fair, and cut alike for any world."""

import pickle
import time

import numpy as np
import pytest

from conf.schema import BatchConfig
from data.order import MIX_BLOCK, FullOrder, Mix, WindowedOrder, micro_batch_weights, rng, sample_at, step_positions


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 16, 17, 1000, 4009])
def test_each_epoch_is_a_permutation(samples: int) -> None:
    epochs = [[sample_at(5, e * samples + i, samples) for i in range(samples)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(samples))
    if samples > 16:
        assert epochs[0] != epochs[1] != epochs[2]
        assert epochs[0] != [sample_at(6, i, samples) for i in range(samples)]


def test_order_is_frozen() -> None:
    """A run resumes with a later version only if the order never changes."""
    assert [sample_at(0, p, 10) for p in range(12)] == [6, 1, 4, 2, 5, 3, 7, 9, 8, 0, 2, 3]
    assert rng(3, 14, "crop").integers(1 << 30, size=3).tolist() == [1049440828, 991431388, 421548455]


@pytest.mark.parametrize("samples", [1, 5, 64, 1000, 5_000_000_000])
def test_many_positions_at_once_are_those_one_by_one(samples: int) -> None:
    order = FullOrder(9, samples)
    for first in (0, 3 * samples, 2 * samples - 7):
        positions = list(range(max(0, first), first + 50))
        assert order.many(positions) == [sample_at(9, position, samples) for position in positions]


def test_billions_of_samples() -> None:
    samples = 5_000_000_000
    seen = {sample_at(0, samples * 3 + p, samples) for p in range(2000)}
    assert len(seen) == 2000 and 0 <= min(seen) < samples // 100 and samples * 99 // 100 < max(seen) < samples


@pytest.mark.parametrize("samples", [5, 12])
def test_every_sample_is_as_likely_at_every_position(samples: int) -> None:
    seeds = 2000
    counts = np.zeros((samples, samples))
    for seed in range(seeds):
        for position in range(samples):
            counts[position, sample_at(seed, position, samples)] += 1
    expected = seeds / samples
    chi_square = ((counts - expected) ** 2 / expected).sum() * (samples - 1) / samples
    freedom = (samples - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array([sample_at(1, p, 4000) for p in range(4000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.06
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected by chance


def test_random_streams_are_pure_and_independent() -> None:
    def draw(seed: int, position: int, purpose: str) -> np.ndarray:
        return rng(seed, position, purpose).standard_normal(2000)

    np.testing.assert_array_equal(draw(0, 7, "noise"), draw(0, 7, "noise"))
    for other in (draw(1, 7, "noise"), draw(0, 8, "noise"), draw(0, 7, "crop")):
        assert abs(np.corrcoef(draw(0, 7, "noise"), other)[0, 1]) < 0.1
    firsts = np.array([rng(0, p, "flip").random() for p in range(4000)])
    assert abs(firsts.mean() - 0.5) < 0.02 and abs(firsts.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("world, micro", [(1, 12), (1, 4), (2, 3), (4, 1), (12, 1)])
def test_a_step_is_the_same_positions_for_any_world_and_micro_batch(world: int, micro: int) -> None:
    parts = [part for rank in range(world) for part in step_positions(24, 12, rank, world, micro)]
    assert {len(part) for part in parts} == {micro}
    assert [position for part in parts for position in part] == list(range(24, 36))
    assert all(micro_batch_weights(12, rank, world, micro) == [1.0] * (12 // world // micro) for rank in range(world))


def test_any_batch_is_shared_exactly_once_and_as_evenly_as_can_be() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(2000):
        world, micro, start = (int(drawn.integers(*bounds)) for bounds in ((1, 20), (2, 40), (0, 1000)))
        batch = int(drawn.integers(world, 600))
        cut = [step_positions(start, batch, rank, world, micro) for rank in range(world)]
        (passes,) = {len(parts) for parts in cut}
        assert passes == min(n for n in range(1, batch + 1) if -(-batch // (n * world)) <= micro)
        parts = [part for own in cut for part in own]
        assert [position for part in parts for position in part] == list(range(start, start + batch))
        assert {len(part) for part in parts} <= {batch // len(parts), -(-batch // len(parts))}
        # That of the samples of all: whatever they are, the mean over them is the weighted mean over means.
        weights = [weight for rank in range(world) for weight in micro_batch_weights(batch, rank, world, micro)]
        means = [np.mean(np.square(part)) for part in parts]
        assert np.dot(weights, means) / len(parts) == pytest.approx(np.mean(np.square(range(start, start + batch))))
        assert BatchConfig(global_batch_size=batch, micro_batch_size=micro, uneven=True).split(world) == (
            max(map(len, parts)),
            passes,
        )


@pytest.mark.parametrize("world, micro", [(5, 1), (13, 12), (1, 0)])
def test_a_world_in_which_some_would_have_no_sample_is_refused(world: int, micro: int) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        step_positions(0, 12, 0, world, micro)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_windowed_epochs_are_permutations_and_read_few_shards_at_a_time(window: int) -> None:
    sizes = [50, 7, 1, 90, 33, 20]
    order, total = WindowedOrder(3, sizes, window), sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    epochs = [[order(epoch * total + i) for i in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        shards = shard_of[epoch]
        spans = {s: (np.flatnonzero(shards == s).min(), np.flatnonzero(shards == s).max()) for s in range(len(sizes))}
        assert max(sum(a <= i <= b for a, b in spans.values()) for i in range(total)) <= window
    assert any(np.any(np.diff(epoch) < 0) for epoch in epochs)


def test_windowed_order_is_frozen() -> None:
    assert [WindowedOrder(3, [5, 7, 1, 9, 4], 2)(p) for p in (0, 1, 2, 25, 26, 51)] == [1, 12, 2, 6, 24, 12]


def test_a_position_deep_in_a_huge_set_is_found_at_once() -> None:
    began = time.monotonic()
    order = WindowedOrder(0, [10_000] * 100_000, 64)
    assert len({order(10**8 + i) for i in range(1000)}) == 1000
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.7, 0.2, 0.1]])
def test_a_mix_keeps_its_shares_and_the_order_of_each_stream(weights: list[float]) -> None:
    blocks = 3
    places = [Mix(5, weights)(p) for p in range(blocks * MIX_BLOCK)]
    for stream, weight in enumerate(weights):
        positions = [p for s, p in places if s == stream]
        assert sorted(positions) == list(range(len(positions)))
        assert len(positions) == pytest.approx(blocks * MIX_BLOCK * weight / sum(weights), abs=blocks)
    for start in range(0, len(places), 512):  # no stretch is of one stream alone
        share = sum(s == 0 for s, _ in places[start : start + 512]) / 512
        assert share == pytest.approx(weights[0] / sum(weights), abs=0.1)


# --- lanes

SIZES = [50, 7, 1, 90, 33, 20, 64, 0, 41, 12, 80, 55, 16, 77, 29, 48]
SHARD_OF = np.repeat(np.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("lanes, batch, window", [(2, 8, 1), (4, 4, 2), (8, 24, 1), (8, 40, 0), (16, 1600, 3)])
def test_epochs_of_lanes_are_permutations_wherever_batches_end(lanes: int, batch: int, window: int) -> None:
    order, total = WindowedOrder(3, SIZES, window, lanes, batch), sum(SIZES)
    assert total % batch  # an epoch begins within a batch
    epochs = [order.many(range(epoch * total, (epoch + 1) * total)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("window", [1, 3])
def test_a_lane_reads_a_window_of_shards_at_a_time(window: int) -> None:
    lanes, batch, total = 4, 8, sum(SIZES)
    order = WindowedOrder(3, SIZES, window, lanes, batch)
    for lane in range(lanes):
        positions = [p for p in range(total) if p % batch // (batch // lanes) == lane]
        shards = SHARD_OF[order.many(positions)]
        spans = [np.flatnonzero(shards == shard) for shard in set(shards.tolist())]
        most = max(sum(span[0] <= i <= span[-1] for span in spans) for i in range(len(shards)))
        assert most <= window and len(shards) == pytest.approx(total / lanes, abs=batch)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_each_rank_reads_its_own_shards_and_its_share_alone(world: int) -> None:
    sizes, lanes, batch = [20] * 96, 8, 24
    order, total, share = WindowedOrder(1, sizes, 2, lanes, batch), 20 * 96, -(-batch // world)
    for epoch in (0, 3):
        read = []
        for rank in range(world):
            steps = range(epoch * total, (epoch + 1) * total, batch)
            own = [p for step in steps for part in step_positions(step, batch, rank, world, share) for p in part]
            read.append({index // 20 for index in order.many(own)})
        assert set.union(*read) == set(range(96))
        # Stretches end within shards; unless ranks divide the lanes, two neighbours may both read one of them.
        assert sum(map(len, read)) <= 96 + (world - 1) * (2 + 12 * (lanes % world > 0))


def test_what_is_upcoming_is_what_is_read() -> None:
    lanes, batch = 4, 8
    order, total = WindowedOrder(3, SIZES, 2, lanes, batch), sum(SIZES)
    for step in range(0, 2 * total, batch):
        for first, last in ((0, 8), (2, 4), (4, 8)):  # of one process, or of a share of lanes
            positions = range(step + first, step + last)
            now = set(SHARD_OF[order.many(positions)].tolist())
            assert now <= set(order.upcoming(positions))
            assert len(order.upcoming(positions)) <= 2 * 2 * (last - first) // (batch // lanes)
    assert FullOrder(0, 9).upcoming(range(3)) == []


def test_one_lane_is_the_windowed_order_and_lanes_are_frozen() -> None:
    assert [WindowedOrder(3, [5, 7, 1, 9, 4], 2, 1, 6)(p) for p in (0, 1, 2, 25, 26, 51)] == [1, 12, 2, 6, 24, 12]
    order = WindowedOrder(3, SIZES, 2, 4, 8)
    assert order.many([0, 1, 2, 7, 8, 622, 623, 10_000]) == [196, 192, 159, 292, 317, 256, 505, 439]
    assert pickle.loads(pickle.dumps(order)).many(range(50)) == order.many(range(50))

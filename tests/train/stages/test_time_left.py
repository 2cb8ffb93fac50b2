"""Time left: expected from costs, then from what a stage tells; evaluations count, and a slow machine corrects all."""

import pytest

from conf.process import Told
from train.stages.time_left import WINDOW_S, Pace, StageCost, Work, correction

WORK = Work(samples=1000, evaluate_every=250)
COST = StageCost(fixed_s=5.0, sample_s=0.1, evaluation_s=10.0)


def train(pace: Pace, at: float, start: int, end: int, sample_s: float, step: int = 10) -> float:
    """Tell of steps from `start` to `end`; returns the moment of the last one."""
    for seen in range(start, end + 1, step):
        pace.hear(Told("training", seen, 1000, at + (seen - start) * sample_s))
    return at + (end - start) * sample_s


def test_evaluations_ahead_are_those_that_the_training_will_make() -> None:
    assert [WORK.evaluations_after(seen) for seen in (0, 240, 250, 999, 1000)] == [4, 4, 3, 1, 0]
    assert Work(1000, 300).evaluations_after(0) == 4  # at 300, 600, 900 and at the end
    assert Work(1000).evaluations_after(0) == 0


def test_before_a_stage_tells_anything_its_cost_counts_and_time_passes() -> None:
    assert COST.seconds(WORK) == pytest.approx(5 + 100 + 40)
    assert Pace().left(0.0, WORK, COST, elapsed_s=20.0) == pytest.approx(125.0)
    assert Pace().left(0.0, WORK, COST, elapsed_s=200.0) == 0.0
    assert Pace().left(0.0, WORK, COST, elapsed_s=1.0, begun=500) == pytest.approx(4 + 50 + 20)
    assert Pace().left(0.0, WORK, None, elapsed_s=1.0) is None
    assert COST.seconds(Work(None)) is None


def test_a_training_is_as_fast_as_it_says_and_not_as_was_expected() -> None:
    pace = Pace()
    now = train(pace, 100.0, 10, 200, sample_s=0.5)
    assert pace.left(now, WORK, COST, 0.0) == pytest.approx(800 * 0.5 + 4 * 10.0)
    assert pace.left(now + 3, WORK, COST, 0.0) == pytest.approx(800 * 0.5 + 4 * 10.0 - 3)


def test_an_evaluation_is_no_training_and_the_next_one_takes_as_long() -> None:
    pace = Pace()
    now = train(pace, 0.0, 10, 250, sample_s=0.5)
    pace.hear(Told("evaluating", 0, 0, now))
    pace.hear(Told("measuring images", 8, 16, now + 6.0))
    assert pace.left(now + 6.0, WORK, COST, 0.0) == pytest.approx(750 * 0.5 + 3 * 10 + 4)
    now = train(pace, now + 30.0, 260, 300, sample_s=0.5)
    assert (pace.evaluations, pace.evaluation_s) == (1, 30.0)
    assert pace.left(now, WORK, COST, 0.0) == pytest.approx(700 * 0.5 + 3 * 30, rel=0.05)


def test_speed_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    now = train(pace, 0.0, 10, 400, sample_s=0.1)
    train(pace, now, 400, 600, sample_s=2 * WINDOW_S / 200)
    assert pace.sample_s == pytest.approx(2 * WINDOW_S / 200, rel=0.01)


def test_what_was_told_twice_counts_once_and_a_restart_counts_nothing() -> None:
    pace = Pace()
    for told in (Told("training", 100, 1000, 1.0), Told("training", 100, 1000, 1.0), Told("training", 60, 1000, 9.0)):
        pace.hear(told)
    assert (pace.samples, pace.seconds) == (0, 0.0)
    pace.hear(Told("training", 80, 1000, 11.0))
    assert (pace.samples, pace.seconds) == (20, 2.0)


def test_a_stage_without_evaluations_is_known_by_its_main_part() -> None:
    pace, work, cost = Pace("measuring images"), Work(128), StageCost(40.0, 0.1)
    pace.hear(Told("training a judge", 200, 400, 0.0))
    assert pace.left(10.0, work, cost, elapsed_s=10.0) == pytest.approx(42.8)
    pace.hear(Told("measuring images", 32, 128, 20.0))
    pace.hear(Told("measuring images", 64, 128, 36.0))
    assert pace.left(36.0, work, cost, elapsed_s=36.0) == pytest.approx(32.0)


def test_true_times_correct_what_is_expected_once_there_are_some() -> None:
    pace = Pace()
    train(pace, 0.0, 10, 30, sample_s=0.2)
    assert correction({"unet": pace}, {"unet": COST}) == 1.0  # two seconds prove nothing
    train(pace, 4.0, 30, 200, sample_s=0.2)
    assert correction({"unet": pace, "clip": Pace()}, {"unet": COST, "sample": COST}) == pytest.approx(2.0)
    assert COST.times(2.0) == StageCost(10.0, 0.2, 20.0)

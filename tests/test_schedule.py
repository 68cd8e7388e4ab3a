"""Schedules are functions of progress alone, and the clock keeps its promise whatever the machine does."""

from __future__ import annotations

import itertools

import pytest

from mvcr_cli.engine import clock as module
from mvcr_cli.engine.clock import Clock
from mvcr_cli.engine.schedule import doubt_share, ema_decay, lr_factor, size_at, training_side

PROGRESS = [step / 200 for step in range(201)]


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_the_learning_rate_rises_once_falls_once_and_ends_at_zero(warmup):
    factors = [lr_factor(progress, warmup) for progress in PROGRESS]
    top = factors.index(max(factors))
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert max(factors) == pytest.approx(1, abs=0.02)
    assert lr_factor(warmup, warmup) == pytest.approx(1)
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert all(factor > 0 for factor in factors[:-1])
    assert lr_factor(1.5, warmup) == factors[-1]


@pytest.mark.parametrize("size", [16, 32, 33, 64, 100, 128, 224, 1000])
def test_the_size_grows_from_half_to_whole(size):
    sizes = [size_at(progress, size) for progress in PROGRESS]
    assert sizes == sorted(sizes)
    assert all(side == size for progress, side in zip(PROGRESS, sizes, strict=True) if progress >= 0.8)
    assert len(set(sizes[:100])) == 1
    assert abs(sizes[0] - max(min(32, size), size / 2)) <= 8
    assert all(side % 16 == 0 or side == size for side in sizes)


def test_doubt_is_taught_once_there_is_something_to_doubt():
    shares = [doubt_share(step / 100) for step in range(101)]
    assert shares[:41] == [0.0] * 41
    assert shares[60:] == [pytest.approx(1.0)] * 41
    assert shares == sorted(shares)


def test_the_training_side_takes_back_what_crops_enlarge():
    assert training_side(224, 1.0) == 224
    assert training_side(128, 1.0) == 128
    for crop in (0.25, 0.5, 0.8):
        assert abs(training_side(224, crop) - 224 * ((1 + crop) / 2) ** 0.5) <= 4
    assert training_side(20, 0.5) <= 20


def test_the_average_forgets_its_start_and_then_keeps_its_decay():
    decays = [ema_decay(step, 0.998) for step in range(20_000)]
    assert decays == sorted(decays)
    assert decays[0] <= 0.1
    assert decays[-1] == 0.998
    assert {ema_decay(step, 0.0) for step in (0, 10, 1000)} == {0.0}


def test_with_epochs_progress_counts_steps_and_nothing_else(fake_time):
    clock = Clock(40, None, started=0.0)
    clock.begin()
    fake_time.now += 1e6
    assert [clock.progress(step) for step in (0, 10, 40)] == [0, 0.25, 1]
    assert not clock.finished(39)
    assert clock.finished(40)
    assert clock.left(20) == pytest.approx(clock.elapsed())


class Time:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch) -> Time:
    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


@pytest.mark.parametrize("budget", [30.0, 180.0, 900.0])
@pytest.mark.parametrize("step_seconds", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("validation", [0.1, 3.0])
@pytest.mark.parametrize("start_up", [0.0, 8.0])
def test_with_a_budget_the_run_ends_inside_it_and_uses_most_of_it(
    fake_time, budget, step_seconds, validation, start_up
):
    """Steps slow down tenfold in the middle, validations take what they take, and the end is on time."""
    clock = Clock(None, budget, started=fake_time.now)
    began = fake_time.now
    fake_time.now += start_up
    clock.begin()
    spent = 0.0
    for step in itertools.count(1):
        assert 0 <= clock.progress(step) <= 1
        slow = 10 if 0.4 < clock.progress(step) < 0.5 else 1
        fake_time.now += step_seconds * slow
        ended = clock.finished(step)
        if ended or fake_time.now - began - spent > 10 * validation + 5:
            fake_time.now += validation
            clock.took_validation(validation)
            spent = fake_time.now - began
        if ended:
            break
    elapsed = fake_time.now - began
    assert elapsed <= budget + 10 * step_seconds
    if budget > 100 + start_up:
        assert elapsed >= 0.8 * budget


def test_time_before_an_interruption_counts(fake_time):
    clock = Clock(None, 100.0, started=fake_time.now, before=60.0)
    clock.begin()
    fake_time.now += 10
    assert clock.elapsed() == pytest.approx(70)
    assert clock.left(5) == pytest.approx(30)
    assert clock.progress(5) > 0.6
    clock.took_validation(5.0)
    fake_time.now += 25
    assert clock.finished(6)


def test_a_start_up_longer_than_the_budget_still_ends(fake_time):
    clock = Clock(None, 5.0, started=fake_time.now)
    fake_time.now += 60
    clock.begin()
    fake_time.now += 1
    assert clock.finished(1)


def test_the_first_validation_is_foreseen_from_the_speed_of_the_training():
    """A third of a step at the size of then, but no less than a training picture took, and never all of the time."""
    clock = Clock(None, 100.0, started=0.0)
    for enlarged, seconds in ((1.0, 10.0), (3.0, 10.0), (6.0, 20.0), (600.0, 50.0)):
        clock.foresee_validation(50, 5.0, enlarged)
        assert clock.validation_seconds == pytest.approx(seconds)
    clock.took_validation(7.0)
    clock.foresee_validation(50, 5.0, 1.0)
    assert clock.validation_seconds == 7.0


def test_training_goes_on_when_the_first_validation_took_less_than_foreseen(fake_time):
    clock = Clock(None, 100.0, started=fake_time.now)
    clock.begin()
    fake_time.now += 45
    clock.foresee_validation(1000, 1.0, 1.0)  # slow first steps: half of the time is foreseen
    assert clock.finished(1)
    clock.took_validation(2.0)
    assert not clock.ended(1)
    fake_time.now += 43
    assert clock.ended(2)  # a few seconds more or less are no reason to go on


def test_no_validation_begins_that_would_leave_no_time_for_the_last_one(fake_time):
    clock = Clock(None, 100.0, started=fake_time.now)
    clock.took_validation(20.0)
    fake_time.now += 48
    assert clock.allows_validation(None)
    fake_time.now += 2
    assert not clock.allows_validation(None)
    assert Clock(10, None, started=0.0).allows_validation(None)

"""Budgets: what a clock counts, which rate and batch size follow from it, in which order data comes."""

import itertools

import pytest

from fastbert_hf.data.order import MicrobatchOrder
from fastbert_hf.training.budget import BudgetClock, falling, ramped_microbatches, triangle


def test_the_rate_is_the_published_triangle():
    for fraction, rate in [(0.0, 0.25), (0.5, 0.75), (0.75, 1.0), (0.9, 0.4), (1.0, 0.0)]:
        assert triangle(fraction) == pytest.approx(rate)
    assert triangle(1.2) == 0.0


def test_the_rate_of_a_good_start_falls_after_a_short_rise():
    for fraction, rate in [(0.0, 0.1), (0.025, 0.55), (0.05, 1.0), (0.525, 0.5), (1.0, 0.0)]:
        assert falling(fraction) == pytest.approx(rate)
    assert falling(1.2) == 0.0


def test_the_batch_grows_to_its_full_size_at_the_end_of_the_ramp():
    sizes = [ramped_microbatches(fraction / 100, 64, 0.6) for fraction in range(101)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[30] == 32 and set(sizes[60:]) == {64}
    assert {ramped_microbatches(fraction / 100, 64, 0.6, processes=4) % 4 for fraction in range(101)} == {0}
    assert ramped_microbatches(0.0, 64, 0.6, processes=4) == 4
    assert ramped_microbatches(0.0, 64, 0.0) == 64  # no ramp


@pytest.mark.parametrize(("unit", "amount"), [("budget_tokens", 40), ("max_steps", 4), ("budget_hours", 40 / 3600)])
def test_the_fraction_is_that_of_the_budgets_unit(unit, amount, monkeypatch):
    now = itertools.count(step=10.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = BudgetClock(unit, amount)
    clock.start()
    clock.tick(10)
    assert clock.fraction == pytest.approx(0.25)
    assert (clock.spent.tokens, clock.spent.steps, clock.spent.seconds) == (10, 1, 10.0)
    other = BudgetClock(unit, amount)
    other.load(clock.state())
    assert other.fraction == clock.fraction
    for _ in range(5):
        clock.tick(10)
    assert clock.fraction == 1.0


def test_processor_time_is_counted_per_thread_and_not_while_waiting(monkeypatch):
    monkeypatch.setattr("time.process_time", itertools.count(step=6.0).__next__)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    clock = BudgetClock("budget_cpu_hours", 30 / 3600)
    clock.start()
    clock.tick(1)
    assert clock.spent.cpu_seconds == 3.0 and clock.fraction == pytest.approx(0.1)


def test_a_state_of_an_earlier_version_is_read():
    clock = BudgetClock("budget_cpu_hours", 1.0)
    clock.load({"seconds": 8.0, "processor_seconds": 6.0, "tokens": 5, "steps": 4})
    assert clock.state() == {"seconds": 8.0, "cpu_seconds": 6.0, "tokens": 5, "steps": 4}


def microbatches(count, start=0, **options):
    order = MicrobatchOrder(10, 3, seed=5, **options)
    order.start = start
    return list(itertools.islice(order, count))


def test_every_epoch_has_each_sequence_once_at_most_and_an_order_of_its_own():
    parts = microbatches(9)
    epochs = [list(itertools.chain(*parts[start : start + 3])) for start in (0, 3, 6)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 9  # the tenth does not fill a microbatch
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_goes_on_from_a_number_and_is_shared_out_among_processes():
    whole = microbatches(12)
    assert microbatches(5, start=7) == whole[7:]
    for rank in range(3):
        assert microbatches(4, rank=rank, processes=3) == whole[rank::3]
        assert microbatches(2, start=6, rank=rank, processes=3) == whole[6 + rank :: 3]
    assert microbatches(12) == whole


def test_fewer_sequences_than_a_microbatch_are_refused():
    with pytest.raises(ValueError, match="2 sequences, 3 are wanted"):
        MicrobatchOrder(2, 3, seed=0)

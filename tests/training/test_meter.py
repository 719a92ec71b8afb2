"""Where the seconds go: what the processes' own say of their teamwork, and rates of what this run did."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.training.meter import Clock, Teamwork, Window

seconds = st.floats(0.001, 100)


def test_one_process_that_waits_for_another():
    work = Teamwork()
    assert work.facts() == {}
    work.add([50, 60], 0, 70)  # it warms up
    assert work.facts() == {}
    work.add([1, 3], 0, 3)  # two seconds of waiting, one of moving gradients
    work.add([3, 3], 0, 1)
    assert work.facts() == {"scaling_efficiency": pytest.approx(5 / 8), "rank_balance": pytest.approx(5 / 6, abs=1e-4)}


@given(st.lists(st.lists(seconds, min_size=3, max_size=3), min_size=2, max_size=6), seconds)
def test_efficiency_is_never_above_the_balance(steps, moving):
    ranks = [Teamwork() for _ in range(3)]
    for own in steps:
        for rank, work in enumerate(ranks):
            work.add(own, rank, max(own) - own[rank] + moving)
    found = [work.facts() for work in ranks]
    assert all(facts == pytest.approx(found[0], abs=1e-4) for facts in found)
    assert 0 <= found[0]["scaling_efficiency"] <= found[0]["rank_balance"] <= 1


def test_own_time_is_neither_exchange_nor_saving(monkeypatch):
    from mmtune.training import meter

    now = iter(range(100))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    clock = Clock()
    for part in ("wait", "forward", "backward"):
        assert clock.lap(part) == 1
    assert clock.own() == 3
    for part in ("sync", "optimizer", "save", "validate"):
        clock.lap(part)
    assert clock.own() == 1 and clock.own() == 0


def test_rates_leave_out_what_went_into_no_step(monkeypatch):
    from mmtune.training import meter

    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    window = Window()
    for pause in (0, 30):
        window.rows, window.tokens = 40, 400
        now[0] += 2 + pause
        window.leave_out(pause)
        row = window.line(1, 0.1)
        assert (row["rows_per_second"], row["tokens_per_second"]) == (20, 200)

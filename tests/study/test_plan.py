"""The planner: everything it plans ends within the time, equally many steps each, and no trial is starved."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postformer.study.plan import Need, allot, durations, makespan

seconds = st.floats(0.002, 0.5)
needs = st.builds(
    lambda weights, steps: {
        f"trial-{i}": Need(w, {f"a{j}": s for j, s in enumerate(per)}, 1.0, most, enough)
        for i, (w, (per, most, enough)) in enumerate(zip(weights, steps))
    },
    st.lists(st.floats(0.1, 1.0), min_size=3, max_size=3),
    st.lists(
        st.tuples(st.lists(seconds, min_size=1, max_size=6), st.integers(1, 5000), st.integers(0, 1000)),
        min_size=3, max_size=3,
    ),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(needs, st.floats(60, 900), st.integers(1, 3), st.lists(st.floats(0, 10), max_size=3))
def test_a_plan_ends_in_time(trials, limit, workers, then):
    steps = allot(limit, workers, trials, then)
    end = makespan([*durations(trials, steps), *then], workers)
    least = makespan([*durations(trials, {k: 1 for k in trials}), *then], workers)
    assert end <= max(limit, least) + 1e-6
    assert all(1 <= steps[k] <= max(1, trials[k].most) for k in trials)


def test_the_time_is_used():
    trials = {
        "s3": Need(0.3, {"a": 0.01, "b": 0.02}, 1.0, 10**6, 900),
        "text": Need(0.7, {"a": 0.1, "b": 0.2}, 3.0, 10**6, 250),
    }
    steps = allot(240, 2, trials)
    end = makespan(durations(trials, steps), 2)
    assert 0.75 * 240 <= end <= 240
    assert steps["s3"] >= 900
    assert steps["text"] >= 250


def test_everyone_gets_enough_before_anyone_gets_more():
    trials = {
        "quick": Need(0.9, {"a": 0.01}, 0.0, 10**6, 100),
        "slow": Need(0.1, {"a": 0.5}, 0.0, 10**6, 100),
    }
    steps = allot(51.5, 1, trials)  # enough for both takes 51 seconds
    assert steps["slow"] in (99, 100)
    assert 100 <= steps["quick"] <= 250


def test_a_full_trial_leaves_its_time_to_the_others():
    trials = {"a": Need(0.5, {"x": 0.1}, 0.0, 10), "b": Need(0.5, {"x": 0.1}, 0.0, 10**6)}
    steps = allot(100, 1, trials)
    assert steps["a"] == 10
    assert 980 <= steps["b"] <= 990


def test_no_time_still_gives_every_trial_a_step():
    trials = {"a": Need(0.5, {"x": 1.0}, 5.0, 100), "b": Need(0.5, {"x": 1.0}, 5.0, 100, least=2)}
    assert allot(3.0, 2, trials) == {"a": 1, "b": 2}


def test_work_that_is_still_running_is_accounted_for():
    trials = {"a": Need(1.0, {"x": 0.1}, 0.0, 10**6)}
    assert allot(100, 1, trials, busy=[40.0])["a"] == pytest.approx(600, abs=2)
    assert allot(100, 2, trials, busy=[40.0])["a"] == pytest.approx(1000, abs=2)


def test_makespan_gives_the_next_job_to_the_first_free_worker():
    assert makespan([5, 4, 3, 3], 2) == 8  # 5 then 3; 4 then 3
    assert makespan([], 2) == 0
    assert makespan([2, 2], 2, busy=[10]) == 10

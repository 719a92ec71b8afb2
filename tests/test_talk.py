"""Progress speaks of this run alone: what an earlier one did counts as done, and as nothing else."""

import io
import json

import pytest
from rich.console import Console

from mmtune import talk


@pytest.fixture
def now(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(talk.time, "monotonic", lambda: seconds[0])
    return seconds


def test_the_time_left_after_a_resume_is_by_this_runs_own_rate(now):
    console = talk.Talk(every_seconds=1.0)
    console.console = Console(file=(said := io.StringIO()), width=160)
    with console.progress(1000, "finetune", done=900) as bar:
        now[0] += 10
        bar.advance(20)
    # 20 steps in 10 seconds, 80 to go.
    assert said.getvalue() == "finetune 920/1000 rate=2.0/s eta=00:00:40\n"


def test_a_bar_after_a_resume_begins_where_the_run_goes_on(now, monkeypatch):
    console = talk.Talk()
    console.console = Console(file=io.StringIO(), width=160, force_terminal=True)
    seen = []
    from rich import progress

    update = progress.Progress.update
    monkeypatch.setattr(
        progress.Progress, "update", lambda self, task, **more: seen.append(more["rate"]) or update(self, task, **more)
    )
    with console.progress(1000, "finetune", done=900) as bar:
        now[0] += 10
        bar.advance(20)
    assert seen == ["2.0/s"]


def test_one_thing_is_told_as_one():
    assert [talk.counted(count, "row") for count in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]


def test_a_document_is_strict_json_whatever_its_numbers():
    nan, infinity = float("nan"), float("inf")
    line = talk.json_line({"a": [1.5, nan, (infinity, -infinity)], "b": {"c": nan}, "d": True, "e": "NaN"})
    found = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": True, "e": "NaN"}

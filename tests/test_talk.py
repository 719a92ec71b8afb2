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


def watched(monkeypatch, field):
    """Returns a console of a terminal, and what its bars are told of a field, as they are told it."""
    console = talk.Talk()
    console.console = Console(file=io.StringIO(), width=200, force_terminal=True)
    seen = []
    from rich import progress

    update = progress.Progress.update
    monkeypatch.setattr(
        progress.Progress, "update", lambda self, task, **more: seen.append(more[field]) or update(self, task, **more)
    )
    return console, seen


def test_a_bar_after_a_resume_begins_where_the_run_goes_on(now, monkeypatch):
    console, seen = watched(monkeypatch, "rate")
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


def test_what_a_loop_told_last_stays_beside_its_bar(monkeypatch):
    console, seen = watched(monkeypatch, "note")
    with console.progress(3, "finetune") as bar:
        bar.advance(1)
        bar.advance(1, "loss=1.9")
        bar.advance(1)
    assert seen == ["", "loss=1.9", "loss=1.9"]


@pytest.mark.parametrize(("width", "loss", "all_of_it"), ((50, False, False), (80, True, False), (160, True, True)))
def test_a_bar_is_one_line_on_a_terminal_of_any_width(width, loss, all_of_it, now):
    console = talk.Talk()
    console.console = Console(file=(said := io.StringIO()), width=width, force_terminal=True, color_system=None)
    note = "loss=1.6700 lr=1.81e-03 rows/s=42 tokens/s=2709 waiting=3%"
    with console.progress(172, "finetune") as bar:
        now[0] += 10
        bar.advance(37, note)
    last = [line for line in said.getvalue().split("\r") if "37/172" in line][-1]
    assert ("loss=1.6700" in last, note in last) == (loss, all_of_it) and "…" not in last


def test_columns_of_numbers_and_of_intervals_are_set_right():
    console = talk.Talk()
    console.console = Console(file=(said := io.StringIO()), width=160, color_system=None)
    rows = [("Exact match", "9.52", "+8.23 [−5.30 to +41.13]", "< 0.001", "7.9 to 12,000", "16 rows")]
    rows += [("", "14.52", "+128.23 [+15.30 to +41.13]", "1.000", "18.4 to 72.0", "9")]
    console.table("scores", ("metric", "base", "difference", "p", "interval", "what"), rows)
    first, second = said.getvalue().splitlines()[-2:]
    assert first.split("│")[1:5] == ["  9.52 ", "    +8.23 [−5.30 to +41.13] ", " < 0.001 ", " 7.9 to 12,000 "]
    assert second.split("│")[4:] == ["  18.4 to 72.0 ", " 9      "]


def test_a_terminal_that_cannot_redraw_gets_lines(now, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = talk.Talk(every_seconds=1.0)
    console.console = Console(file=(said := io.StringIO()), width=80, force_terminal=True)
    with console.progress(10, "finetune") as bar:
        now[0] += 10
        bar.advance(5, "loss=1.9")
    assert said.getvalue() == "finetune 5/10 rate=0.5/s eta=00:00:10 loss=1.9\n"

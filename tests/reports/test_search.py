"""The course of a search as bars: one per share of the calls, each as high as the best score by then."""

from mmtune.reports.search import search_facts, search_lines, sparkline


def line(calls: int, score: float, best: float | None, full: bool = True) -> dict:
    candidate = {"instruction": f"say {score}", "exemplars": ["a"], "verbalizer": 2}
    return {"kind": "score", "calls": calls, "score": score, "best": best, "full": full, "candidate": candidate}


LINES = [
    {"kind": "start"},
    line(4, 0.9, None, full=False),
    line(10, 0.2, 0.2),
    {"kind": "proposal", "key": "x", "text": "y"},
    line(20, 0.1, 0.2),
    line(50, 0.6, 0.6),
    line(100, 0.4, 0.6),
]


def test_facts_are_those_of_the_trace():
    found = search_facts(LINES)
    assert found["rises"] == [{"calls": 10, "best": 0.2}, {"calls": 50, "best": 0.6}]
    assert (found["scored"], found["proposals_asked"], found["calls"]) == (5, 1, 100)
    assert [one["score"] for one in found["prompts"]] == [0.6, 0.4, 0.2, 0.1]


def test_bars_rise_where_the_score_did():
    assert sparkline(search_facts(LINES)["rises"], 100, width=10) == "▃▃▃▃██████"
    assert sparkline([{"calls": 50, "best": 0.5}], 100, width=4) == " ███"
    small = [{"calls": 25, "best": 0.1249}, {"calls": 75, "best": 0.125}]
    assert sparkline(small, 100, width=4) == "████", "a rise that cannot be seen is not drawn"
    below = [{"calls": 25, "best": -2.0}, {"calls": 75, "best": -1.0}]
    assert sparkline(below, 100, width=4) == "▁▁▅▅", "of rewards below 0 the axis ends there"
    assert sparkline([], 0) == ""


def test_lines_name_exemplars_and_words():
    text = "\n".join(search_lines("ape", search_facts(LINES)))
    assert "0.2000 to 0.6000 in 100 calls" in text and "'say 0.6' + 1 exemplar, words 2" in text
    assert search_lines("ape", search_facts([])) == ["ape: no prompt was scored on all dev rows"]

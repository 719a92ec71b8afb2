"""Scores by group, and the gates."""

import numpy as np
import pytest

from mmtune.errors import RecipeError
from mmtune.evaluation.comparison import ScoredRow, check_bars, compare, failed_gates, perplexities


def row(name: str, source: str, metric: str = "exact_match", **more) -> ScoredRow:
    return ScoredRow(name, source, more.pop("task", "vqa"), name, (metric,), more.pop("references", ("yes",)), **more)


ROWS = [
    row("1", "old", metadata={"answer_type": "yes/no"}),
    row("2", "old", metadata={"answer_type": "yes/no"}),
    row("3", "new"),
    row("4", "new", metric="wer", references=("a b",)),
    row("5", "new", references=()),
]
TEXTS = {"base": ["yes", "no", "no", "a b", "?"], "tuned": ["yes", "no", "yes", "a c", "?"]}


def test_each_metric_scores_its_own_rows_and_groups():
    found = compare(ROWS, TEXTS, resamples=100)
    entry = found.metrics["exact_match"]
    assert entry["n"] == 3  # the row without references is not scored
    assert entry["models"]["base"]["value"] == pytest.approx(33.3333)
    assert entry["models"]["tuned"]["value"] == pytest.approx(66.6667)
    assert (entry["difference"]["wins"], entry["difference"]["losses"], entry["difference"]["ties"]) == (1, 0, 2)
    old, new = found.groups["source"]["old"], found.groups["source"]["new"]
    assert old["exact_match"]["difference"]["value"] == 0 and new["exact_match"]["difference"]["value"] == 100
    assert new["wer"]["difference"]["losses"] == 1 and not new["wer"]["higher_is_better"]
    assert list(found.groups["answer_type"]) == ["yes/no"]
    assert found.per_row["tuned"][3] == {"wer": 50.0} and found.per_row["tuned"][4] == {}


def test_one_model_has_no_difference():
    found = compare(ROWS, {"base": TEXTS["base"]}, resamples=100)
    assert "difference" not in found.metrics["exact_match"]


def test_cider_of_a_group_keeps_the_rarity_of_the_whole():
    rows = [row(str(n), "a" if n < 2 else "b", "cider", references=(f"cat {n} sat here",)) for n in range(4)]
    texts = {"base": [f"cat {n} sat here" for n in range(4)]}
    found = compare(rows, texts, resamples=100)
    assert found.groups["source"]["a"]["cider"]["models"]["base"]["value"] == pytest.approx(
        np.mean([found.per_row["base"][n]["cider"] for n in (0, 1)])
    )


def test_macro_f1_of_a_group_is_its_own_and_no_end_is_above_100():
    labels = ["joy"] * 9 + ["fear"]
    rows = [row(str(n), "a" if n < 5 else "b", "macro_f1", references=(label,)) for n, label in enumerate(labels)]
    found = compare(rows, {"base": labels, "tuned": ["joy"] * 10}, resamples=200)
    whole = found.metrics["macro_f1"]["models"]
    assert whole["base"]["value"] == whole["base"]["high"] == 100.0
    assert whole["tuned"]["value"] == pytest.approx(100 * (18 / 19) / 2, abs=1e-3)
    parts = {name: entry["macro_f1"]["models"] for name, entry in found.groups["source"].items()}
    assert parts["a"]["base"]["value"] == parts["b"]["base"]["value"] == parts["a"]["tuned"]["value"] == 100.0
    assert parts["b"]["tuned"]["value"] == pytest.approx(100 * (8 / 9) / 2, abs=1e-3)


def test_perplexity_weighs_tokens_not_rows():
    losses = {
        "base": (np.array([3.0, 0.0]), np.array([1.0, 2.0])),
        "tuned": (np.array([0.0, 0.0]), np.array([1.0, 2.0])),
    }
    found = perplexities(losses, ["a", "b"], resamples=100)
    assert found["models"]["base"]["value"] == pytest.approx(np.e, abs=1e-4)
    assert found["models"]["tuned"]["value"] == 1.0 and found["tokens"] == 3
    assert found["loss_difference"]["value"] == pytest.approx(-1.0)


def test_gates():
    metrics = compare(ROWS, TEXTS, resamples=100).metrics
    assert failed_gates(metrics, "tuned", {"exact_match": 60, "wer": 60}) == []
    missed = failed_gates(metrics, "tuned", {"exact_match": 70, "wer": 40, "cider": 1})
    assert len(missed) == 3 and "cider was not scored" in missed[2]


def test_a_fraction_is_no_bar_where_scores_are_of_100():
    check_bars({"exact_match": 60, "vqa_accuracy": 0, "wer": 0.5, "cider": 110})
    for name, bar, meant in (("vqa_accuracy", 0.6, "60"), ("macro_f1", 1.0, "100"), ("cider", 0.9, "90")):
        with pytest.raises(RecipeError, match=f"{name} .* never fail") as error:
            check_bars({"wer": 0.5, name: bar})
        assert error.value.hint == f"write {name}: {meant}"

"""Numbers and verdicts as a report words them."""

import pytest

from mmtune.reports.wording import named, p_value, perplexity, verdict


def test_verdict_needs_interval_and_test():
    def entry(value, low, high, p, higher=True):
        return {"difference": {"value": value, "low": low, "high": high, "p": p}, "higher_is_better": higher}

    assert verdict(entry(5, 1, 9, 0.01)) == "better"
    assert verdict(entry(5, 1, 9, 0.2)) == "unclear"
    assert verdict(entry(5, -1, 9, 0.01)) == "unclear"
    assert verdict(entry(-5, -9, -1, 0.01)) == "worse"
    assert verdict(entry(-5, -9, -1, 0.01, higher=False)) == "better"
    assert verdict({"higher_is_better": True}) == ""
    assert p_value(0.0004) == "< 0.001" and p_value(0.0123) == "0.012"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1978767.05, "1,980,000"),
        (999.6, "1,000"),
        (123.4, "123"),
        (12.345, "12.3"),
        (9.999, "10.0"),
        (1.0, "1.00"),
        (1.2345, "1.23"),
    ],
)
def test_a_perplexity_has_three_significant_digits(value, said):
    assert perplexity(value) == said and perplexity(float("inf")) == "inf"


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("exact_match", "exact match"),
        ("token_f1", "token F1"),
        ("vqa_accuracy", "VQA accuracy"),
        ("rouge_l", "ROUGE-L"),
        ("cider", "CIDEr"),
        ("wer", "word error rate"),
    ],
)
def test_a_metric_inside_a_sentence_keeps_its_abbreviation(metric, said):
    assert named(metric) == said

"""F1 of labels and of entities, against scikit-learn and the definition by positions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mmtune.evaluation import measure, metrics_of
from mmtune.evaluation.labels import entities_of
from mmtune.readers.conll import entity_spans

labels = st.sampled_from(["joy", "anger", "fear", "Joy.", "no label"])


@given(st.lists(st.tuples(labels, st.sampled_from(["joy", "anger", "fear"])), min_size=1, max_size=40))
def test_macro_f1_equals_scikit_learns(pairs: list[tuple[str, str]]):
    given_, wanted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = measure("macro_f1", given_, [[label] for label in wanted]).score
    plain = [text.casefold().strip(".") for text in given_]
    expected = f1_score(wanted, plain, labels=sorted(set(wanted)), average="macro", zero_division=0)
    assert found == pytest.approx(100 * expected, abs=1e-9)


def written(tokens: list[str], tags: list[str]) -> str:
    spans = entity_spans(tags)
    return "; ".join(f"{kind}: {' '.join(tokens[start:end])}" for kind, start, end in spans) or "none"


def micro_f1_by_position(pairs: list[tuple[list[str], list[str]]]) -> float:
    """Returns what seqeval's ``f1_score`` does: sets of (sentence, type, start, end), 2TP / (predicted + true)."""
    given_ = {(at, *span) for at, (tags, _) in enumerate(pairs) for span in entity_spans(tags)}
    true = {(at, *span) for at, (_, tags) in enumerate(pairs) for span in entity_spans(tags)}
    return 200.0 * len(given_ & true) / (len(given_) + len(true))


def test_entity_f1_equals_the_definition_by_positions(shared_datasets):
    text = (shared_datasets / "wnut17/emerging.dev.conll").read_text("utf-8")
    blocks = [
        [line.split("\t") for line in block.splitlines() if line.strip()]
        for block in text.replace("\n\t\n", "\n\n").split("\n\n")
    ]
    dice = random.Random(0)
    kinds = ["O", "B-person", "I-person", "B-location", "I-location"]
    pairs, answers = [], []
    for block in blocks:
        # Every token its own: an answer says what is named and not where.
        tokens = [f"{token}{at}" for at, (token, _) in enumerate(block)]
        true = [tag.strip() for _, tag in block]
        guess = [tag if dice.random() < 0.9 else dice.choice(kinds) for tag in true]
        pairs.append((guess, true))
        answers.append((written(tokens, guess), written(tokens, true)))
    found = measure("entity_f1", [one for one, _ in answers], [[one] for _, one in answers])
    assert len(pairs) > 1000 and 20 < found.score < 95
    assert found.score == pytest.approx(micro_f1_by_position(pairs), abs=1e-9)
    assert found.higher_is_better


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("person: Ann; place: Bern", "place: Bern; person: Ann", 100),
        ("person: Ann", "person: Ann; place: Bern", 200 / 3),
        ("person: Bern", "place: Bern", 0),
        ("none", "none", 0),  # no entities: the row weighs nothing
        ("None.", "person: Ann", 0),
        ("Person:  ann", "person: Ann", 100),
        ("Ann", "person: Ann", 0),
        ("person: Ann; person: Ann", "person: Ann", 200 / 3),
    ],
)
def test_entity_f1_of_one_row(prediction: str, reference: str, score: float):
    found = measure("entity_f1", [prediction], [[reference]])
    assert found.score == pytest.approx(score)


def test_what_an_answer_names():
    assert entities_of("a: b c; d: e") == [("a", "b c"), ("d", "e")]
    assert entities_of("a: b; c: .") == [("a", "b"), ("c", ".")]
    assert entities_of("a: b:c") == [("a", "b:c")] and entities_of(" ; ") == []


def test_tasks_have_their_metrics():
    assert metrics_of("sentiment_analysis", "none", None) == ("accuracy", "macro_f1")
    assert metrics_of("named_entity_recognition", "none", None) == ("entity_f1",)
    assert metrics_of("question_answering", "none", None) == ("exact_match", "token_f1")

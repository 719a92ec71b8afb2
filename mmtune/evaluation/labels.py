"""Metrics of labels and of named entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmtune.evaluation.text import label_normalise


def macro_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns one value per row whose mean is the macro F1 in percent: the mean of the classes' F1.

    The classes are the labels of the references (of each row the first); an answer that is none of
    them is wrong and no class of its own. A right row of class c bears 2 / (predicted as c +
    references of c), times rows / classes, and a wrong row bears nothing. With the classes given,
    the mean equals ``sklearn.metrics.f1_score(average="macro")``; intervals over rows hold the
    denominators fixed.
    """
    wanted = [label_normalise(row[0]) if row else "" for row in references]
    given = [label_normalise(text) for text in predictions]
    sizes, named = Counter(wanted), Counter(given)
    scale = 100.0 * len(wanted) / max(len(sizes), 1)
    return [
        scale * 2.0 / (sizes[label] + named[label]) if label == guess else 0.0
        for label, guess in zip(wanted, given, strict=True)
    ]


def entity_matches(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Returns twice the entities in common, and the entities of both together, for the best reference.

    The ratio of their sums over all rows is the micro F1 over entities, 2TP / (predicted + true): a
    right one has the right type and the whole name. It equals seqeval's and ``conlleval``'s F1
    wherever no sentence names the same thing twice, since a generated answer says what is named and
    not where. Case and spaces do not count; ``none`` names nothing.
    """
    guess = Counter(entities_of(prediction))
    pairs = []
    for reference in references or ("",):
        true = Counter(entities_of(reference))
        pairs.append((2.0 * (guess & true).total(), float(guess.total() + true.total())))
    return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[1] else 1.0)


def entities_of(text: str) -> list[tuple[str, str]]:
    """Returns ``(type, name)`` of every entity in ``type: name; type: name``.

    A part without a colon is a name without a type, which matches nothing that has one.
    """
    bare = text.strip()
    if not bare or label_normalise(bare) == "none":
        return []
    found = []
    for part in bare.split("; "):
        kind, colon, name = part.strip().strip(";").partition(":")
        if not colon:
            kind, name = "", kind
        if name.strip():
            found.append((" ".join(kind.casefold().split()), " ".join(name.casefold().split())))
    return found

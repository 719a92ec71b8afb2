"""Caption metrics: corpus BLEU, ROUGE-L and CIDEr, equal to the official ones on equal tokens.

The formulas are those of github.com/salaniz/pycocoevalcap. Its tokenizer (PTB, Java) is not
used: words here are runs of letters, digits and apostrophes in lower case, so scores of raw
text may differ from published ones in the first decimal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_WORDS = re.compile(r"[\w']+")
_ORDERS = 4
_LENGTH_SIGMA = 6.0
_ROUGE_BETA = 1.2

Ngrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Returns the lower-case words of a caption."""
    return _WORDS.findall(text.lower())


def _ngrams(tokens: Sequence[str], order: int) -> Ngrams:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], order: int = 4) -> float:
    """Returns corpus BLEU of an order in percent (Papineni et al. 2002, closest reference length)."""
    right, shown = np.zeros(order), np.zeros(order)
    length = reference_length = 0
    for prediction, texts in zip(predictions, references, strict=True):
        guess, others = words(prediction), [words(text) for text in texts]
        length += len(guess)
        reference_length += min((len(other) for other in others), key=lambda size: (abs(size - len(guess)), size))
        for n in range(1, order + 1):
            most: Ngrams = Counter()
            for other in others:
                most |= _ngrams(other, n)
            right[n - 1] += sum((_ngrams(guess, n) & most).values())
            shown[n - 1] += max(len(guess) - n + 1, 0)
    # The tiny numbers are the official script's own guard against empty counts.
    bleu = float(np.prod((right + 1e-15) / (shown + 1e-9))) ** (1 / order)
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    return 100.0 * bleu * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def rouge_l(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns ROUGE-L of one caption, 0 to 100 (Lin 2004, recall weighted 1.2, best of each side)."""
    guess = words(prediction)
    others = [other for text in references if (other := words(text))]
    if not guess or not others:
        return 0.0
    common = [_longest_common(guess, other) for other in others]
    precision = max(common) / len(guess)
    recall = max(count / len(other) for count, other in zip(common, others, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    weight = _ROUGE_BETA**2
    return min(100.0, 100.0 * (1 + weight) * precision * recall / (recall + weight * precision))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for left in first:
        diagonal = 0
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns CIDEr per caption; rare words are those rare among the given references.

    Vedantam et al. 2015, arXiv:1411.5726, with the clipping and length penalty of CIDEr-D as in
    the official script. In percent, as papers print it: 100 is the official 1.0, and a caption
    equal to its only reference has 1000. With a single example every word is in all documents,
    so the score is 0.
    """
    others = [[_all_ngrams(text) for text in texts] for texts in references]
    documents: Ngrams = Counter(gram for texts in others for gram in {gram for counts in texts for gram in counts})
    log_documents = math.log(max(len(others), 1))
    rarity = {gram: log_documents - math.log(max(1, count)) for gram, count in documents.items()}
    scores = []
    for prediction, texts in zip(predictions, others, strict=True):
        guess = _vectors(_all_ngrams(prediction), rarity, log_documents)
        similar = [_similarity(guess, _vectors(counts, rarity, log_documents)) for counts in texts]
        scores.append(1000.0 * sum(similar) / len(similar) if similar else 0.0)
    return scores


def _all_ngrams(text: str) -> Ngrams:
    tokens = words(text)
    counts: Ngrams = Counter()
    for order in range(1, _ORDERS + 1):
        counts += _ngrams(tokens, order)
    return counts


_Vectors = tuple[list[dict[tuple[str, ...], float]], list[float], int]


def _vectors(counts: Ngrams, rarity: dict[tuple[str, ...], float], unseen: float) -> _Vectors:
    """Returns tf-idf weights per order, their norms, and the caption's length in bigrams."""
    weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * rarity.get(gram, unseen)
    norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(guess: _Vectors, other: _Vectors) -> float:
    penalty = math.exp(-((guess[2] - other[2]) ** 2) / (2 * _LENGTH_SIGMA**2))
    total = 0.0
    for ours, theirs, norm, their_norm in zip(guess[0], other[0], guess[1], other[1], strict=True):
        shared = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
        total += shared / (norm * their_norm) if norm and their_norm else shared
    return penalty * total / _ORDERS

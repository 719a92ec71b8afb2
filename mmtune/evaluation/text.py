"""Metrics of one short answer against its references: match, F1, ChartQA's relaxed match, error rates.

Each returns 0 to 100 for one answer and takes the best of several references. What is
stripped before comparing stands in each function's docstring and in ``NORMALISERS`` of the
room, so that a report can say it.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence

_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LABEL_EDGES = " \t\r\n.,;:!?\"'`()[]"
_NUMBER = re.compile(r"[+-]?(\d+(,\d{3})*(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_WORDS = re.compile(r"[\w']+")


def squad_normalise(text: str) -> str:
    """Returns lower-case text without ASCII punctuation, articles and extra spaces (SQuAD's rules)."""
    bare = text.lower().translate(_SQUAD_PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", bare).split())


def _squad_references(references: Sequence[str]) -> list[str]:
    # The official script leaves out references of which nothing remains; none at all means "no answer".
    return [normal for reference in references if (normal := squad_normalise(reference))] or [""]


def exact_match(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns 100 when the answer equals a reference after SQuAD's normalisation, else 0.

    The rules are those of ``evaluate-v2.0.py`` in github.com/rajpurkar/SQuAD-explorer.
    """
    guess = squad_normalise(prediction)
    return 100.0 * any(guess == reference for reference in _squad_references(references))


def token_f1(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns the best F1 of the bags of words, after SQuAD's normalisation (same script)."""
    guess = squad_normalise(prediction).split()
    return 100.0 * max(_f1(guess, reference.split()) for reference in _squad_references(references))


def _f1(guess: list[str], reference: list[str]) -> float:
    if not guess or not reference:
        return float(guess == reference)
    same = sum((Counter(guess) & Counter(reference)).values())
    # One division instead of precision and recall: 2PR / (P + R) = 2 same / (guess + reference).
    return 2.0 * same / (len(guess) + len(reference))


def label_normalise(text: str) -> str:
    """Returns a label folded in case, spaces collapsed, punctuation at its ends removed."""
    return " ".join(text.casefold().strip(_LABEL_EDGES).split())


def accuracy(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns 100 when the answer names a reference label exactly, else 0.

    Case, repeated spaces and punctuation at the ends do not count; nothing else is forgiven, so
    an answer that names the label within a sentence is wrong.
    """
    guess = label_normalise(prediction)
    return 100.0 * any(guess == label_normalise(reference) for reference in references)


def relaxed_accuracy(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns 100 when the answer is right by ChartQA's relaxed rule, else 0.

    A number may be off by 5 % of the reference's absolute value; a reference of 0 must be met
    exactly (Masry et al. 2022, arXiv:2203.10244, after Methani et al. 2020). A percent sign and
    thousands separators are stripped, so "3%" equals "3". Text must be equal but for case and
    outer spaces. A reference list such as ``[3, 5]`` is compared element by element, in order.
    The rule is known to be lax on years: 1990 counts for 2000.
    """
    return 100.0 * any(_relaxed(prediction, reference) for reference in references)


def _relaxed(prediction: str, reference: str) -> bool:
    wanted = _elements(reference)
    if wanted is not None:
        given = _elements(prediction)
        if given is None:
            given = [item.strip() for item in prediction.split(",")]
        return len(given) == len(wanted) and all(map(_relaxed_item, given, wanted))
    return _relaxed_item(prediction, reference)


def _relaxed_item(prediction: str, reference: str) -> bool:
    given, wanted = _number(prediction), _number(reference)
    if given is None or wanted is None:
        return prediction.strip().casefold() == reference.strip().casefold()
    # The slack keeps 5 % itself inside: 1.05 against 1 is 0.05000000000000004 in binary.
    return given == wanted if wanted == 0 else abs(given - wanted) <= 0.05 * abs(wanted) * (1 + 1e-9)


def _number(text: str) -> float | None:
    bare = text.strip().removesuffix("%").strip()
    return float(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None


def _elements(text: str) -> list[str] | None:
    """Returns the items of a bracketed list, or None when the text is not one."""
    bare = text.strip()
    if not (bare.startswith("[") and bare.endswith("]")):
        return None
    try:
        values = json.loads(bare)
    except (ValueError, RecursionError):
        values = bare[1:-1].split(",")
    return [str(value).strip().strip("'\"") for value in values] if bare[1:-1].strip() else []


def speech_normalise(text: str) -> str:
    """Returns text folded in case, words and digits only, single spaces (apostrophes stay)."""
    return " ".join(_WORDS.findall(text.casefold()))


def word_errors(prediction: str, references: Sequence[str]) -> tuple[int, int]:
    """Returns word edits to the nearest reference, and that reference's number of words."""
    guess = speech_normalise(prediction).split()
    return _fewest_errors(guess, [speech_normalise(reference).split() for reference in references])


def character_errors(prediction: str, references: Sequence[str]) -> tuple[int, int]:
    """Returns character edits to the nearest reference, and that reference's number of characters."""
    guess = list(speech_normalise(prediction))
    return _fewest_errors(guess, [list(speech_normalise(reference)) for reference in references])


def _fewest_errors(guess: list[str], references: list[list[str]]) -> tuple[int, int]:
    counted = [(edit_distance(guess, reference), len(reference)) for reference in references]
    return min(counted, key=lambda pair: (pair[0] / max(pair[1], 1), pair[0]), default=(len(guess), 0))


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the least number of insertions, deletions and substitutions (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]

"""VQA accuracy by the rules of the official scorer, and the score of a whole results file.

The rules are those of ``vqaEval.py`` in github.com/GT-Vision-Lab/VQA (Antol et al. 2015,
arXiv:1505.00468): an answer counts ``min(matches / 3, 1)`` against each set of nine of the
ten human answers, and the ten values are averaged. Texts are normalised only when the ten
answers are not all equal. Scores are comparable with published ones only if the scorer's
oddities are kept, so they are, each with a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

NORMALISER = "vqa-v2 official"

# The official list of punctuation: no colon, apostrophe or period.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# The official pattern begins with `(?!<=\d)`, a mistyped look-behind that is always true: only
# what follows the period counts, so "3.x" loses its period although a digit stands before it.
_PERIOD = re.compile(r"\.(?!\d)")
# The official call passes `re.UNICODE` as the count, so that at most 32 periods go.
_MOST_PERIODS = int(re.UNICODE)
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}

# Contractions whose key is the word without its apostrophe.
_BARE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're they've
    'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Double contractions: each key lacks one of the two apostrophes.
_DOUBLE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _BARE.split()}
    for word in _DOUBLE.split():
        first, second = (at for at, letter in enumerate(word) if letter == "'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    # Entries of no pattern, kept as the official table has them. Its keys with a capital I are
    # left out: texts are lower case by then, so they never match.
    table |= {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    triple = "y'all'd've"
    return table | {"yall'd've": triple, "y'alld've": triple, "y'all'dve": triple}


_CONTRACTIONS = _contractions()


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Returns an answer without punctuation, articles, number words and spelling of contractions."""
    return _words(_without_punctuation(text))


def _without_punctuation(text: str) -> str:
    # Whether a mark goes or becomes a space is asked of the whole text as it came in.
    digits = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        loose = digits or mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if loose else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def _words(text: str) -> str:
    # Articles are looked for after number words, contractions after both.
    numbered = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """Returns the official VQA accuracy of one answer, from 0 to 100.

    Args:
        prediction: The model's answer as it came.
        references: The human answers, ten in the official data. With fewer than four even a
            perfect answer stays below 100, as in the official script.
        options: Not used; every metric has the same parameters.
    """
    return 100 * _share(prediction, references)


def few_references(references: Iterable[Sequence[str]]) -> list[str]:
    """Returns a note where rows have too few human answers for the official rule, else nothing."""
    few = sum(0 < len(texts) < 4 for texts in references)
    if not few:
        return []
    said = "1 row has" if few == 1 else f"{few:,} rows have"
    return [f"VQA accuracy: {said} fewer than four references; a perfect answer stays below 100 there."]


def _share(prediction: str, references: Sequence[str]) -> float:
    answers = [_clean(reference) for reference in references]
    guess = _clean(prediction)
    if not answers:
        return 0.0
    if len(set(answers)) > 1:
        answers = [normalise(answer) for answer in answers]
        guess = normalise(guess)
    matches = sum(answer == guess for answer in answers)
    # Summed answer by answer as the official script does, so that even the last bit is equal.
    left_out = (min(1.0, (matches - (answer == guess)) / 3) for answer in answers)
    return sum(left_out) / len(answers)


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """One annotated question of the official files.

    Attributes:
        answers: The human answers in the file's order.
    """

    question_id: int
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


def score_vqa(answers: Mapping[int, str], questions: Iterable[VqaQuestion]) -> dict[str, object]:
    """Returns ``overall``, ``perQuestionType``, ``perAnswerType`` as percent of 2 decimals.

    Args:
        answers: Predicted answer per ``question_id``; every question must have one.
        questions: The annotated questions.
    """
    per_question: dict[int, float] = {}
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for question in questions:
        value = _share(answers[question.question_id], question.answers)
        per_question[question.question_id] = value
        by_question_type.setdefault(question.question_type, []).append(value)
        by_answer_type.setdefault(question.answer_type, []).append(value)
    return {
        "overall": _mean(per_question.values()),
        "perQuestionType": {name: _mean(values) for name, values in by_question_type.items()},
        "perAnswerType": {name: _mean(values) for name, values in by_answer_type.items()},
        "perQuestion": {key: round(100 * value, 2) for key, value in per_question.items()},
    }


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return round(100 * sum(kept) / len(kept), 2) if kept else 0.0

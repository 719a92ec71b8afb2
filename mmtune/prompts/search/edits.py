"""The offline proposer: rewrites of an instruction by rule, and sentences induced from solved rows.

An instruction is lines of sentences; a slot ends one. An edit drops, adds, swaps or moves a sentence, rewords a
phrase by a table, turns the list of options on or off, adds a word that the rows use, or changes exemplars and label
words, where the space lets it. It is a weaker writer than a chat model and needs none.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.proposer import Mistake, Solved
from mmtune.prompts.search.scorer import Scored
from mmtune.prompts.search.space import Space, slots_of

PARAPHRASES: tuple[tuple[str, ...], ...] = (
    ("Answer", "Reply", "Respond"),
    ("Answer with", "Reply with", "Give", "Say"),
    ("one word", "a single word", "one word only", "a word"),
    ("one of", "exactly one of", "one of these:"),
    ("Choose", "Pick", "Select"),
    ("Question:", "Q:", "Asked:"),
    ("Answer:", "A:", "The answer is"),
    ("Text:", "Input:", "Read:"),
    ("Options:", "Choices:", "Possible answers:"),
    ("briefly", "in short", "in few words"),
    ("Look", "Look closely", "Look carefully"),
    ("What is", "Tell", "Say"),
    ("sentiment", "feeling", "opinion", "tone"),
    ("picture", "image", "photo"),
)
"""Phrases that may stand for each other."""

PHRASES = (
    "Answer briefly.",
    "Answer with one word.",
    "Reply with a single word or phrase.",
    "Give only the answer.",
    "Look closely.",
    "Think carefully.",
    "Choose the best answer.",
    "Read this and answer.",
    "Question:",
    "Answer:",
    "Task:",
)
"""Sentences that fit any task."""

_FEW_ANSWERS = 12
_MOST_WORDS = 60
_SENTENCE = re.compile(r"(?<=[.!?:}])[ \t]+")
_WORD = re.compile(r"[^\W\d_]{2,20}")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?")

Lines = list[list[str]]


def lines_of(text: str) -> Lines:
    """Returns the sentences of every line."""
    return [[part for part in _SENTENCE.split(line) if part] for line in text.split("\n")]


def text_of(lines: Lines) -> str:
    """Returns lines of sentences as text, without empty lines at the ends."""
    return "\n".join(" ".join(line) for line in lines).strip("\n")


@dataclass(frozen=True)
class Edits:
    """Proposes prompts by rule.

    Attributes:
        space: What may change.
        solved: Rows to learn from; the exemplars of the space are among them.
    """

    space: Space
    solved: tuple[Solved, ...] = ()

    def first(self, count: int, dice: random.Random) -> list[Candidate]:
        """Returns the start with induced sentences before or after it, then with those that fit any task."""
        start = self.space.start
        induced, general = list(induced_sentences(self.solved)), list(PHRASES)
        dice.shuffle(induced)
        dice.shuffle(general)
        out: list[Candidate] = []
        for sentence in (*induced, *general):
            texts = [f"{sentence}\n{start.instruction}", f"{start.instruction}\n{sentence}"]
            dice.shuffle(texts)
            out += [self.space.draw(text, dice) for text in texts]
        return out[:count]

    def near(self, candidate: Candidate, count: int, dice: random.Random) -> list[Candidate]:
        """Returns a candidate after one edit each."""
        return [self._edited(candidate, dice) for _ in range(count)]

    def after(self, history: Sequence[Scored], count: int, dice: random.Random) -> list[Candidate]:
        """Returns edits of the better half of the history, some with a sentence of another of the better half."""
        better = [one.candidate for one in history[len(history) // 2 :]] or [self.space.start]
        out = []
        for _ in range(count):
            # Drawn twice, the later (better) one wins.
            parent = better[max(dice.randrange(len(better)), dice.randrange(len(better)))]
            if dice.random() < 0.5:
                parent = _with_sentence_of(parent, dice.choice(better), dice)
            out.append(self._edited(parent, dice))
        return out

    def mended(
        self, candidate: Candidate, mistakes: Sequence[Mistake], count: int, dice: random.Random
    ) -> list[Candidate]:
        """Returns a candidate with what its mistakes call for, then plain edits of it."""
        remedies = self._remedies(candidate, mistakes)
        dice.shuffle(remedies)
        out = remedies[: (count + 1) // 2]
        return [*out, *self.near(candidate, count - len(out), dice)]

    def _remedies(self, candidate: Candidate, mistakes: Sequence[Mistake]) -> list[Candidate]:
        sentences: list[str] = []
        answers = Counter(mistake.row.answer for mistake in mistakes)
        known = {one.answer for one in self.solved}
        if any(mistake.said and mistake.said not in known for mistake in mistakes):
            sentences += induced_sentences(self.solved)
        if any(len(mistake.said.split()) > len(mistake.row.answer.split()) for mistake in mistakes):
            sentences += PHRASES[:4]
        out = [_added(candidate, sentence, last) for sentence in sentences for last in (False, True)]
        if "exemplars" in self.space.vary and answers:
            missed = answers.most_common(1)[0][0]
            fitting = [one.id for one in self.solved if one.answer == missed and one.id in self.space.exemplars]
            kept = candidate.exemplars[-(self.space.shots - 1) :] if self.space.shots > 1 else ()
            out += [replace(candidate, exemplars=(*kept, one)) for one in fitting if one not in kept]
        return out

    def _edited(self, candidate: Candidate, dice: random.Random) -> Candidate:
        """Returns a candidate after one edit of a part that may change."""
        part = dice.choice(sorted(self.space.vary))
        if part == "exemplars":
            return replace(candidate, exemplars=self._other_exemplars(candidate.exemplars, dice))
        if part == "verbalizer":
            others = [at for at in range(self.space.verbalizers) if at != candidate.verbalizer]
            return replace(candidate, verbalizer=dice.choice(others)) if others else candidate
        edits = list(_EDITS)
        dice.shuffle(edits)
        for edit in edits:
            text = edit(self, candidate.instruction, dice)
            if text is not None and text != candidate.instruction:
                return replace(candidate, instruction=text)
        return candidate

    def _other_exemplars(self, shown: tuple[str, ...], dice: random.Random) -> tuple[str, ...]:
        spare = [one for one in self.space.exemplars if one not in shown]
        ways = ["swap"] if len(shown) > 1 else []
        ways += ["drop"] if shown else []
        ways += ["add"] if spare and len(shown) < self.space.shots else []
        ways += ["replace"] if spare and shown else []
        if not ways:
            return shown
        way, rows = dice.choice(ways), list(shown)
        at = dice.randrange(len(rows)) if rows else 0
        if way == "swap":
            other = dice.randrange(len(rows))
            rows[at], rows[other] = rows[other], rows[at]
        elif way == "drop":
            del rows[at]
        elif way == "add":
            rows.insert(at, dice.choice(spare))
        else:
            rows[at] = dice.choice(spare)
        return tuple(rows)


def induced_sentences(solved: Sequence[Solved]) -> tuple[str, ...]:
    """Returns what solved rows show of their answers, as sentences: which there are, and how long."""
    answers = Counter(one.answer.strip() for one in solved if one.answer.strip())
    if not answers:
        return ()
    out = []
    known = [answer for answer, _ in sorted(answers.items(), key=lambda item: (-item[1], item[0]))]
    plain = all("{" not in answer and "}" not in answer and "\n" not in answer for answer in known)
    if plain and len(known) <= _FEW_ANSWERS:
        listed = ", ".join(known)
        out += [f"Answer with one of: {listed}.", f"Possible answers: {listed}.", f"Choose among {listed}."]
        if len(known) == 2:
            out += [f"Answer {known[0]} or {known[1]}.", f"Is it {known[0]} or {known[1]}?"]
    if all(_NUMBER.fullmatch(answer) for answer in known):
        out += ["Answer with a number.", "Reply with digits only."]
    longest = max(len(answer.split()) for answer in known)
    if longest <= 3:
        out.append("Answer with one word." if longest == 1 else f"Use at most {longest} words.")
    if all(answer == answer.lower() for answer in known) and any(answer.isalpha() for answer in known):
        out.append("Answer in lower case.")
    return tuple(out)


def frequent_words(solved: Sequence[Solved]) -> tuple[str, ...]:
    """Returns the words that rows and answers use most, the most frequent first."""
    found = Counter(word for one in solved for word in _WORD.findall(f"{one.asked} {one.answer}"))
    return tuple(word for word, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_MOST_WORDS])


def _drop(edits: Edits, text: str, dice: random.Random) -> str | None:
    lines = lines_of(text)
    free = [(at, place) for at, line in enumerate(lines) for place, one in enumerate(line) if not slots_of(one)]
    if not free:
        return None
    at, place = dice.choice(free)
    del lines[at][place]
    return text_of([line for line in lines if line])


def _swap(edits: Edits, text: str, dice: random.Random) -> str | None:
    lines = lines_of(text)
    places = [(at, place) for at, line in enumerate(lines) for place in range(len(line))]
    if len(places) < 2:
        return None
    (a, b), (c, d) = dice.sample(places, 2)
    lines[a][b], lines[c][d] = lines[c][d], lines[a][b]
    return text_of(lines)


def _move(edits: Edits, text: str, dice: random.Random) -> str | None:
    lines = lines_of(text)
    if len(lines) < 2:
        return None
    line = lines.pop(dice.randrange(len(lines)))
    return text_of([line, *lines] if dice.random() < 0.5 else [*lines, line])


def _reword(edits: Edits, text: str, dice: random.Random) -> str | None:
    ways = []
    for group in PARAPHRASES:
        for old in group:
            for match in re.finditer(rf"(?<![\w{{]){re.escape(old)}(?![\w}}])", text):
                ways += [(match.start(), old, new) for new in group if new != old]
    if not ways:
        return None
    at, old, new = dice.choice(ways)
    return text[:at] + new + text[at + len(old) :]


def _options(edits: Edits, text: str, dice: random.Random) -> str | None:
    if "options" not in edits.space.slots:
        return None
    if "{options}" in text:
        if "options" in slots_of(edits.space.start.instruction):
            return None
        lines = [[one for one in line if "{options}" not in one] for line in lines_of(text)]
        return text_of([line for line in lines if line])
    said = dice.choice(("Options: {options}.", "Answer with one of: {options}.", "Choose among {options}."))
    return _with(text, said, dice.random() < 0.5)


def _add(edits: Edits, text: str, dice: random.Random) -> str | None:
    sentences = [one for one in (*induced_sentences(edits.solved), *PHRASES) if one not in text]
    return _with(text, dice.choice(sentences), dice.random() < 0.5) if sentences else None


def _word(edits: Edits, text: str, dice: random.Random) -> str | None:
    words = frequent_words(edits.solved)
    if not words:
        return None
    lines = lines_of(text)
    line = dice.choice(lines)
    line.insert(dice.randint(0, len(line)), dice.choice(words))
    return text_of(lines)


def _join(edits: Edits, text: str, dice: random.Random) -> str | None:
    lines = lines_of(text)
    if len(lines) > 1:
        at = dice.randrange(len(lines) - 1)
        return text_of([*lines[:at], [*lines[at], *lines[at + 1]], *lines[at + 2 :]])
    if len(lines[0]) < 2:
        return None
    at = dice.randrange(1, len(lines[0]))
    return text_of([lines[0][:at], lines[0][at:]])


_EDITS: tuple[Callable[[Edits, str, random.Random], str | None], ...] = (
    _drop,
    _swap,
    _move,
    _reword,
    _options,
    _add,
    _add,
    _word,
    _join,
)
"""Ways to edit an instruction, each None where it cannot; a sentence is added twice as often."""


def _with(text: str, sentence: str, last: bool) -> str:
    return f"{text}\n{sentence}" if last else f"{sentence}\n{text}"


def _added(candidate: Candidate, sentence: str, last: bool) -> Candidate:
    return replace(candidate, instruction=_with(candidate.instruction, sentence, last))


def _with_sentence_of(candidate: Candidate, other: Candidate, dice: random.Random) -> Candidate:
    """Returns a candidate with a sentence of another one that it does not have, and its exemplars now and then."""
    theirs = [one for line in lines_of(other.instruction) for one in line if not slots_of(one)]
    spare = [one for one in theirs if one not in candidate.instruction]
    if other.exemplars != candidate.exemplars and dice.random() < 0.3:
        candidate = replace(candidate, exemplars=other.exemplars)
    return _added(candidate, dice.choice(spare), dice.random() < 0.5) if spare else candidate

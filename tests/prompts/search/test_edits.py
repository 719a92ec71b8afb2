"""The offline proposer, what a space refuses, and what admission counts."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.prompts.search import Admission, Candidate, Mistake, Scored, Solved, Space, slots_of
from mmtune.prompts.search.edits import Edits, frequent_words, induced_sentences, lines_of, text_of

YES_NO = tuple(Solved(str(at), f"Is the left digit {at}?", ("yes", "no")[at % 2], ()) for at in range(6))
SPACE = Space(
    Candidate("Look at it. {prompt}\nAnswer briefly."),
    vary=frozenset({"instruction", "exemplars", "verbalizer"}),
    exemplars=tuple(one.id for one in YES_NO),
    shots=2,
    verbalizers=3,
    slots=frozenset({"prompt", "options", "question"}),
    longest=200,
)


def test_sentences_are_induced_from_answers():
    found = induced_sentences(YES_NO)
    assert "Answer no or yes." in found and "Answer with one word." in found and "Answer in lower case." in found
    numbers = [Solved(str(at), "How many?", str(at)) for at in range(20)]
    assert "Answer with a number." in induced_sentences(numbers)
    # Twenty answers are too many to list.
    assert not any("one of" in sentence for sentence in induced_sentences(numbers))
    assert induced_sentences([]) == ()
    assert not any("{" in one for one in induced_sentences([Solved("a", "q", "{x}"), Solved("b", "q", "y")]))


def test_words_that_rows_use_most_come_first():
    assert frequent_words(YES_NO)[:4] == ("Is", "digit", "left", "the")


@pytest.mark.parametrize("text", ["{prompt}", "A: b. C?\n\nD {question} e! F", "x\ny\nz"])
def test_lines_of_sentences_are_the_text(text: str):
    assert text_of(lines_of(text)).replace("\n", " ").split() == text.split()


def walk(start: Candidate, seed: int, steps: int) -> list[Candidate]:
    dice, edits = random.Random(seed), Edits(SPACE, YES_NO)
    out = [start]
    for _ in range(steps):
        out += edits.near(out[-1], 1, dice)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_no_edit_deletes_or_repeats_a_slot(seed: int):
    for one in walk(SPACE.start, seed, 12):
        assert "prompt" in slots_of(one.instruction)
        assert SPACE.fault(one) in ("", "too_long", "slot_repeated") and one.instruction.count("{prompt}") == 1


def test_edits_reach_every_part_and_every_kind():
    tried = [one for seed in range(40) for one in walk(SPACE.start, seed, 10)]
    assert {one.verbalizer for one in tried} == {0, 1, 2} and {len(one.exemplars) for one in tried} == {0, 1, 2}
    texts = [one.instruction for one in tried]
    assert any("Look" not in text for text in texts), "a sentence is dropped"
    assert any("{options}" in text for text in texts), "options are turned on"
    assert any("Reply" in text or "Respond" in text for text in texts), "a phrase is reworded"
    assert any(text.startswith("{prompt}") for text in texts), "the question moves"
    assert any("Answer no or yes." in text for text in texts), "a sentence is induced"
    assert any(" digit " in f" {text} " for text in texts), "a word of the rows is added"


def test_parts_that_do_not_vary_stay():
    only = Space(Candidate("{prompt}"), vary=frozenset({"instruction"}), exemplars=("0",), shots=1, verbalizers=2)
    edits, dice = Edits(only, YES_NO), random.Random(0)
    proposed = [*edits.first(20, dice), *edits.near(only.start, 20, dice)]
    assert proposed and all(one.exemplars == () and one.verbalizer == 0 for one in proposed)
    fixed = Space(Candidate("{prompt}"), vary=frozenset({"exemplars"}), exemplars=("0", "1"), shots=1)
    assert {one.instruction for one in Edits(fixed, YES_NO).near(fixed.start, 20, dice)} == {"{prompt}"}


def test_mistakes_call_for_remedies():
    edits, dice = Edits(SPACE, YES_NO), random.Random(0)
    mistakes = [Mistake(YES_NO[1], "seven digits are there", 0.0)]
    found = [one for _ in range(20) for one in edits.mended(SPACE.start, mistakes, 4, dice)]
    assert any("Answer no or yes." in one.instruction for one in found)
    shown = {name for one in found for name in one.exemplars}
    assert shown & {one.id for one in YES_NO if one.answer == YES_NO[1].answer}


def test_proposals_after_a_history_come_from_its_better_half():
    history = [
        Scored(Candidate("Bad one. {prompt}"), 0.1),
        Scored(Candidate("Poor one. {prompt}"), 0.2),
        Scored(Candidate("{prompt} Good."), 0.8),
        Scored(Candidate("{prompt} Better."), 0.9),
    ]
    found = Edits(SPACE, YES_NO).after(history, 40, random.Random(0))
    assert not any("Bad" in one.instruction or "Poor" in one.instruction for one in found)
    assert any("Good" in one.instruction and "Better" in one.instruction for one in found)


def test_equal_dice_propose_equally():
    edits = Edits(SPACE, YES_NO)
    first, second = (edits.near(SPACE.start, 30, random.Random(7)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Candidate("  "), "empty"),
        (Candidate("{prompt}" + "x" * 200), "too_long"),
        (Candidate("Look at it."), "slot_lost"),
        (Candidate("{prompt} {answer}"), "unknown_slot"),
        (Candidate("{prompt} {prompt}"), "slot_repeated"),
        (Candidate("{prompt} {"), "stray_brace"),
        (Candidate("{prompt}", ("9",)), "unknown_exemplar"),
        (Candidate("{prompt}", ("0", "0")), "bad_exemplars"),
        (Candidate("{prompt}", ("0", "1", "2")), "bad_exemplars"),
        (Candidate("{prompt}", (), 3), "unknown_verbalizer"),
        (Candidate("{prompt} {{x}}", ("0",), 2), ""),
    ],
)
def test_what_a_space_refuses(candidate: Candidate, reason: str):
    assert SPACE.fault(candidate) == reason


def test_admission_lets_each_in_once_and_counts_the_rest():
    admission = Admission(SPACE)
    good = Candidate("{prompt} Now.")
    assert admission([good, good, Candidate(""), Candidate("no slot"), Candidate("{prompt}" * 99)]) == [good]
    assert admission([good]) == []
    assert admission.refused == {"duplicate": 2, "empty": 1, "slot_lost": 1, "too_long": 1}

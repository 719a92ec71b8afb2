"""What is taken away, from which rows, and what that says."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmtune.evaluation.ablation import (
    KINDS,
    Ablated,
    Ablation,
    RowFacts,
    ablation_report,
    changed_places,
    commonest_answers,
    idle_kinds,
    plan_ablations,
    row_facts,
    with_question,
    without_media,
    without_shots,
)
from mmtune.evaluation.comparison import ScoredRow
from mmtune.records import Example, Medium, Message, TextPart

PICTURE, SOUND = Medium("image", "a.png"), Medium("audio", "b.wav")


def example(*parts: Medium | str, before: tuple[Message, ...] = ()) -> Example:
    asked = Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))
    return Example(
        id="1",
        source="s",
        task="vqa",
        split="test",
        messages=(*before, asked, Message("assistant", (TextPart("yes"),))),
        references=("yes",),
        metric="accuracy",
    )


def test_media_of_a_modality_are_left_out_and_nothing_else():
    given = example("Look: ", PICTURE, SOUND, "same?")
    assert [m.modality for m in without_media(given, ["image"]).media] == ["audio"]
    assert without_media(given, ["image", "audio"]).messages[0].text == "Look: same?"
    assert without_media(given, ["video"]) == given


def test_another_question_stands_where_the_text_stood():
    shot = (Message("user", (PICTURE, TextPart("old?"))), Message("assistant", (TextPart("no"),)))
    changed = with_question(example(PICTURE, "one? ", SOUND, "two?", before=shot), "new?")
    assert changed.messages[:2] == shot and changed.messages[-1].text == "yes"
    assert changed.messages[2].parts == (PICTURE, TextPart("new?"), SOUND)
    assert with_question(example(PICTURE), "new?").messages[0].parts == (PICTURE, TextPart("new?"))


def test_exemplars_go_and_the_system_turn_stays():
    system = Message("system", (TextPart("Be short."),))
    shot = (Message("user", (TextPart("old?"),)), Message("assistant", (TextPart("no"),), train=False))
    given = replace(example(PICTURE, "new?", before=(system, *shot)), exemplar_ids=("7",))
    assert row_facts(given) == RowFacts(frozenset({"image"}), True, "new?")
    bare = without_shots(given)
    assert bare.messages == (system, *given.messages[3:]) and not bare.exemplar_ids


@pytest.mark.parametrize("seed", range(20))
def test_no_question_keeps_its_place(seed):
    draw = random.Random(seed)
    texts = [draw.choice("aabcdef"[: draw.randint(2, 7)]) for _ in range(draw.randint(2, 40))]
    given = changed_places(texts, seed)
    assert all(texts[other] != texts[row] for row, other in given.items())
    assert max(Counter(given.values()).values(), default=1) == 1, "a text is given on once"
    most = max(Counter(texts).values())
    left_out = len(texts) - len(given)
    assert left_out == max(0, 2 * most - len(texts)), "as few rows are left out as can be"


def test_places_change_by_seed_and_need_two_texts():
    texts = [f"question {n}" for n in range(50)]
    assert changed_places(texts, 0) == changed_places(texts, 0) != changed_places(texts, 1)
    assert changed_places(["same"] * 5, 0) == {} == changed_places([], 0)


def test_plan_names_what_rows_and_model_have():
    facts = [
        RowFacts(frozenset({"image"}), False, "a?"),
        RowFacts(frozenset({"image", "audio"}), True, "b?"),
        RowFacts(frozenset(), False, "c?"),
    ]
    kinds = ("modality", "fusion", "shots", "instructions")
    plain = plan_ablations(kinds, facts, branches=(), by_mask=False, seed=0)
    assert [(one.name, one.rows) for one in plain] == [
        ("without image", (0, 1)),
        ("without audio", (1,)),
        ("without any medium", (0, 1)),
        ("without exemplars", (1,)),
        ("questions shuffled", (0, 1, 2)),
    ]
    assert plain[0].change(0, example(PICTURE, SOUND, "?")).media == (SOUND,) and not plain[0].missing
    masked = plan_ablations(["modality"], facts[:1], branches=(), by_mask=True, seed=0)
    assert [(one.name, one.missing) for one in masked] == [("without image", ("image",))]
    assert masked[0].change(0, example(PICTURE, "?")).media == (PICTURE,)
    alone = plan_ablations(["fusion"], facts, branches=("joint", "image", "audio"), by_mask=True, seed=0)
    assert [(one.branch, one.rows) for one in alone] == [("joint", (0, 1)), ("image", (0, 1)), ("audio", (1,))]


def test_what_takes_nothing_away_is_named_with_its_reason():
    bare = [RowFacts(frozenset(), False, "same?")] * 2
    idle = idle_kinds(("modality", "fusion", "shots", "instructions"), bare, ())
    assert list(idle) == ["modality", "fusion", "shots", "instructions"] and idle["shots"] == "no row shows exemplars"
    rich = [RowFacts(frozenset({"image"}), True, "a?"), RowFacts(frozenset(), False, "b?")]
    assert idle_kinds(KINDS, rich, ("joint", "image")) == {}
    assert list(idle_kinds(("fusion",), rich, ("image",))) == ["fusion"]


def scored(number: int, source: str, reference: str) -> ScoredRow:
    return ScoredRow(f"{number}", source, "vqa", f"g{number}", ("exact_match",), (reference,))


def test_report_compares_the_same_rows():
    rows = [scored(n, "s", "yes" if n % 4 else "no") for n in range(40)]
    texts = [row.references[0] for row in rows]
    losses = np.full(40, 0.5), np.full(40, 2.0)
    half = tuple(range(0, 40, 2))
    gone = Ablated(
        Ablation("modality", "without image", half), half, ["yes"] * 20, (np.full(20, 2.0), np.full(20, 2.0))
    )
    found = ablation_report(rows, "tuned", texts, losses, [gone], ("modality", "shots"), resamples=200)
    assert found["model"] == "tuned" and found["nothing"] == ["shots"]
    entry, guess = found["entries"]
    assert (entry["name"], entry["n"]) == ("without image", 20)
    scores = entry["metrics"]["exact_match"]
    assert [value["value"] for value in scores["models"].values()] == [100.0, 50.0]
    assert scores["difference"]["value"] == -50.0 and scores["difference"]["losses"] == 10
    assert scores["difference"]["low"] < -50 < scores["difference"]["high"] < 0
    assert entry["perplexity"]["models"]["without image"]["value"] == pytest.approx(np.exp(1.0), abs=1e-3)
    assert [value["value"] for value in guess["metrics"]["exact_match"]["models"].values()] == [100.0, 75.0]


def test_guessing_knows_the_source():
    rows = [scored(0, "a", "x"), scored(1, "a", "x"), scored(2, "b", "y"), scored(3, "a", "z")]
    assert commonest_answers(rows) == ["x", "x", "y", "x"]

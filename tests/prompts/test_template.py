from collections import Counter
from dataclasses import replace

import pytest

from mmtune.prompts.overlap import SplitOverlap, example_keys
from mmtune.prompts.template import POOLS, Style, Wordings, choose_templates, group_key, make_example, template_names
from mmtune.records import Example, Medium, Message, Record, Reject, TextPart

VQA = Record(
    "s/1", "s", "vqa", "train", text="What {context} is {options}?", media=(Medium("image", "a.jpg"),),
    references=("log", "tree"), target="tree",
)  # fmt: skip


OWN_OPTIONS = ("sentiment_analysis", "recommendation")


def example(record: Record, *, templates="pool", template=None, **options) -> Example:
    made = make_example(record, wordings=Wordings(templates, template), **options)
    assert isinstance(made, Example)
    return made


def test_a_question_becomes_media_then_prompt_then_answer():
    made = example(VQA, templates="first")
    asked, answer = made.messages
    assert asked.parts[0] == VQA.media[0] and asked.role == "user" and answer.role == "assistant"
    assert asked.text == "What {context} is {options}?\nAnswer the question using a single word or phrase."
    assert answer.text == "tree" and made.references == ("log", "tree")
    assert made.metric == "vqa_accuracy" and made.template_id == "vqa_short"


def test_the_first_reference_is_taught_without_a_target():
    assert example(replace(VQA, target="")).messages[-1].text == "log"


def test_nothing_to_teach():
    empty = replace(VQA, references=(), target="")
    refused = make_example(empty)
    assert isinstance(refused, Reject) and refused.reason == "no_target"
    asked = example(replace(empty, split="test"))
    assert [m.role for m in asked.messages] == ["user"] and asked.metric == "none"


def choose_template(record: Record, *, seed: int, templates="pool"):
    return choose_templates(record, seed=seed, wordings=Wordings(templates), style=Style())[0]


@pytest.mark.parametrize("task", sorted(set(POOLS) - {"label_options", "choice"}))
def test_every_template_is_drawn_and_the_draw_is_by_id_and_seed(task: str):
    whole = {"context": "c", "fields": {"types": "person"}, "options": ("log", "tree") if task in OWN_OPTIONS else ()}
    records = [
        replace(VQA, id=f"s/{at}", task=task, media=(Medium("image", f"{at}.jpg"),), **whole) for at in range(400)
    ]
    if task == "label":
        records = [replace(record, text="") for record in records]
    drawn = [choose_template(record, seed=3) for record in records]
    counts = Counter(template.id for template in drawn)
    pool = [template for template in POOLS[task] if not template.inverted]
    assert set(counts) == {template.id for template in pool}
    assert min(counts.values()) > 400 / len(pool) / 2
    assert [choose_template(record, seed=3) for record in reversed(records)] == drawn[::-1]
    if len(counts) > 1:
        assert [choose_template(record, seed=4) for record in records] != drawn
    assert {choose_template(record, seed=3, templates="first") for record in records} == {POOLS[task][0]}


def test_captions_of_one_image_share_their_prompt():
    base = Record("s/0", "s", "caption", "train", media=(Medium("image", "x/a.jpg"),), references=("c",))
    asked = {example(replace(base, id=f"s/{at}")).template_id for at in range(50)}
    assert len(asked) == 1
    # The media root may change when a source is added; the wording must not.
    assert example(replace(base, media=(Medium("image", "deeper/x/a.jpg"),))).template_id in asked


def test_template_ids_are_unique_and_one_can_be_named():
    assert len(template_names()) == sum(len(pool) for pool in POOLS.values())
    assert example(VQA, template="vqa_plain").messages[0].text == VQA.text


def test_options_and_context():
    label = Record(
        "s/1", "s", "label", "val", media=(Medium("audio", "a.wav"),), references=("dog",), options=("cat", "dog")
    )
    assert "cat, dog" in example(label, templates="first").messages[0].text
    assert "cat" not in example(replace(label, options=tuple(map(str, range(50))))).messages[0].text
    choice = replace(VQA, options=("oak", "fir"))
    assert "Options: oak, fir" in example(choice, templates="first").messages[0].text
    told = Record("s/1", "s", "instruction", "train", text="Sum up.", context="Long.", references=("S.",))
    assert example(told, templates="first").messages[0].text == "Sum up.\n\nLong."
    text = Record("s/1", "s", "text", "train", references=("Once upon a time.",))
    assert [m.role for m in example(text).messages] == ["assistant"]


@pytest.mark.parametrize(
    ("task", "references", "metric"),
    [
        ("vqa", ("a",) * 10, "vqa_accuracy"),
        ("vqa", ("a",), "exact_match"),
        ("chart", ("3",), "relaxed_accuracy"),
        ("count", ("3",), "accuracy"),
        ("presence", ("yes",), "accuracy"),
        ("label", ("cat",), "accuracy"),
        ("caption", ("a cat",), "none"),
        ("instruction", ("x",), "none"),
    ],
)
def test_metrics(task: str, references: tuple[str, ...], metric: str):
    assert example(replace(VQA, task=task, references=references, target="")).metric == metric


def test_conversations_pass_through_and_get_the_system_turn():
    turns = (
        Message("user", (Medium("image", "a.jpg"), TextPart("q"))),
        Message("assistant", (TextPart("a"),)),
    )
    record = Record("s/1", "s", "conversation", "train", messages=turns)
    made = example(record)
    assert made.messages == turns and made.references == ("a",) and made.template_id == "" and made.metric == "none"
    assert example(record, system="Be kind.").messages[0] == Message("system", (TextPart("Be kind."),))
    own = replace(record, messages=(Message("system", (TextPart("Mine."),)), *turns))
    assert example(own, system="Be kind.").messages == own.messages


def test_groups_are_equal_for_the_same_media_in_the_same_order():
    a, b = Medium("image", "a.jpg"), Medium("image", "b.jpg")
    assert example(VQA).group == example(replace(VQA, id="s/2", text="Other?")).group
    assert group_key((a, b)) != group_key((b, a)) != group_key((a,))
    assert group_key((a,)) != group_key((Medium("audio", "a.jpg"),))
    assert group_key((a,), "system") != group_key((a,))
    assert group_key((Medium("image", "", data=b"1"),)) != group_key((Medium("image", "", data=b"2"),))
    assert group_key((replace(a, width=3),)) == group_key((a,))
    assert example(replace(VQA, media=())).group == VQA.id


def test_what_two_splits_share_is_counted():
    import numpy as np

    def keys(*pairs: tuple[str, str]):
        made = [
            example(replace(VQA, text=q, media=(Medium("image", m),) if m else ()), templates="first") for m, q in pairs
        ]
        return np.array([example_keys(one) for one in made], np.uint64)

    overlap = SplitOverlap()
    overlap.add("train", keys(("a", "1"), ("a", "2"), ("b", "1"), ("", "t")))
    overlap.add("val", keys(("a", "1"), ("a", "3"), ("c", "1"), ("", "t")))
    overlap.add("test", keys(("d", "1")))
    assert overlap.counts() == {"train/val": {"media": 1, "questions": 2}}
    assert overlap.distinct_media() == 4

from collections import Counter
from dataclasses import replace

import pytest

from mmtune.errors import RecipeError
from mmtune.prompts.forms import Filled, Template
from mmtune.prompts.overlap import SplitOverlap, example_keys
from mmtune.prompts.template import (
    POOLS,
    Style,
    Wordings,
    check_task,
    choose_templates,
    group_key,
    make_example,
    template_names,
)
from mmtune.prompts.verbalizer import check_verbalizer, verbalized
from mmtune.records import Example, Medium, Message, Record, Reject, TextPart, history

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


@pytest.mark.parametrize("task", sorted(set(POOLS) - {"label_options", "choice", "recommendation_shown"}))
def test_every_template_is_drawn_and_the_draw_is_by_id_and_seed(task: str):
    whole = {"context": "c", "fields": {"types": "person"}, "options": ("log", "tree") if task in OWN_OPTIONS else ()}
    records = [
        replace(VQA, id=f"s/{at}", task=task, media=(Medium("image", f"{at}.jpg"),), **whole) for at in range(400)
    ]
    if task == "label":
        records = [replace(record, text="") for record in records]
    drawn = [choose_template(record, seed=3) for record in records]
    counts = Counter(template.id for template in drawn)
    pool = [one for one in POOLS[task] if not one.inverted and (not one.speaks_of or "image" in one.speaks_of)]
    assert set(counts) == {template.id for template in pool}
    assert min(counts.values()) > 400 / len(pool) / 2
    assert [choose_template(record, seed=3) for record in reversed(records)] == drawn[::-1]
    if len(counts) > 1:
        assert [choose_template(record, seed=4) for record in records] != drawn
    assert {choose_template(record, seed=3, templates="first") for record in records} == {POOLS[task][0]}


OTHERS = {
    "image": ("sound", "recording", "listen", "hear", "video", "clip", "watch"),
    "audio": ("image", "picture", "look", "see", "shown", "video", "clip", "watch", "scene"),
    "video": ("image", "picture", "sound", "recording", "listen", "hear"),
}


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize("task", ["vqa", "caption", "presence"])
def test_the_words_fit_the_kind_of_media(task: str, kind: str, inverted: bool):
    row = replace(VQA, task=task, media=(Medium(kind, "a"),))
    fit = choose_templates(row, seed=0, wordings=Wordings(), style=Style(inverted=inverted))
    least = 2 if task == "presence" else 10
    assert len(fit) >= (0 if inverted else least)
    said = " ".join(one.prompt.lower() for one in fit)
    assert not [word for word in OTHERS[kind] if word in said]


def test_rows_without_media_and_with_several_kinds():
    def named(task: str, *kinds: str) -> set[str]:
        row = replace(VQA, task=task, media=tuple(Medium(kind, "a") for kind in kinds))
        return {one.id for one in choose_templates(row, seed=0, wordings=Wordings(), style=Style())}

    plain = {"vqa_short", "vqa_plain", "vqa_question", "vqa_q_a", "vqa_brief"}
    assert named("vqa") == plain
    assert named("vqa", "image", "audio") == plain | {"vqa_media_first"}
    assert named("vqa", "image", "video") == plain | {"vqa_media_first", "vqa_shown", "vqa_see"}
    assert named("caption") == set()
    assert {"caption_sentence", "caption_sound_sentence"} <= named("caption", "image", "audio")
    nothing = make_example(Record("s/1", "s", "caption", "train", references=("a cat",)))
    assert isinstance(nothing, Reject) and nothing.reason == "template_empty"


def test_a_history_that_is_shown_is_asked_about_and_not_told():
    row = Record("s/1", "s", "recommendation", "train", media=(history(("1", "2")),), references=("Heat",))
    shown = {one.id for one in choose_templates(row, seed=0, wordings=Wordings(), style=Style())}
    listed = {"recommend_shown_options", "recommend_shown_pick", "recommend_shown_flan"}
    assert shown == {one.id for one in POOLS["recommendation_shown"]} - listed
    few = replace(row, options=("Heat", "Jumanji"))
    ids = {one.id for one in choose_templates(few, seed=0, wordings=Wordings(), style=Style(options=True))}
    assert ids == listed
    made = example(row)
    assert made.messages[0].media == row.media and made.messages[0].text and "2" not in made.messages[0].text
    asked = replace(row, text="Will they like it?")
    assert "Will they like it?" in example(asked).messages[0].text
    told = example(replace(row, media=(), text="Alien, Aliens"))
    assert "Alien, Aliens" in told.messages[0].text and told.template_id.startswith("recommend_")


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


def test_wording_and_exemplars_do_not_hide_what_two_splits_share():
    record = replace(VQA, text="How many?", media=(Medium("image", "a"),))
    shown = replace(VQA, id="s/9", media=(Medium("image", "z"),))
    plain = example(record, templates="first")
    other = replace(
        plain,
        messages=(*example(shown).messages, *plain.messages[:-2], Message("user", plain.media), plain.messages[-1]),
    )
    assert len(other.media) == 2 and example_keys(other) != example_keys(plain)
    assert example_keys(other, record) == example_keys(plain, record)
    assert example_keys(other, replace(record, text="How old?")) != example_keys(plain, record)


TASKS_OF_TEN = (
    "vqa",
    "caption",
    "chart",
    "sentiment_analysis",
    "named_entity_recognition",
    "question_answering",
    "dialogue",
    "recommendation",
    "instruction",
)


@pytest.mark.parametrize("task", TASKS_OF_TEN)
def test_a_task_has_at_least_ten_wordings_and_each_is_filled_whole(task: str):
    record = Record(
        "s/1", "s", task, "train", text="TEXT", context="CONTEXT", references=("ANSWER",), options=("ANSWER", "OTHER"),
        media=(Medium("image", "a.jpg"),), fields={"types": "person, place"},
    )  # fmt: skip
    pool = POOLS[task]
    assert sum(not template.inverted for template in pool) >= 10
    prompts = set()
    for template in pool:
        made = example(record, template=template.id)
        asked, answer = made.messages
        assert made.template_id == template.id and template.task == task
        assert "{" not in asked.text and "\0" not in asked.text and asked.media == record.media
        assert answer.text == ("ANSWER" if not template.inverted else answer.text) != ""
        assert ("OTHER" in asked.text) == template.shows_options
        assert ("ANSWER" in asked.text) == (template.inverted or template.shows_options)
        prompts.add(asked.text)
    assert len(prompts) == len(pool)


def test_metadata_of_the_shipped_templates():
    by_id = template_names()
    assert by_id["sentiment_flan"].shows_options and not by_id["sentiment_what"].shows_options
    assert by_id["entities_list"].answer_kind == "entities" and by_id["sentiment_what"].answer_kind == "label"
    assert by_id["qa_generate"].inverted and by_id["qa_generate"].task == "question_answering"


def test_flans_list_of_options():
    record = replace(VQA, task="sentiment_analysis", text="Fine.", references=("a",), target="", options=("a", "b"))
    assert example(record, template="sentiment_list").messages[0].text.startswith("OPTIONS:\n- a\n- b\n\n")


def test_styles():
    record = Record(
        "s/1", "s", "sentiment_analysis", "train", text="Fine.", references=("good",), options=("bad", "good"),
        rationale="It says fine.",
    )  # fmt: skip
    for at in range(30):
        one = replace(record, id=f"s/{at}")
        assert template_names()[example(one, style=Style(options=True)).template_id].shows_options
        assert not template_names()[example(one, style=Style(options=False)).template_id].shows_options
        turned = example(one, style=Style(inverted=True))
        assert template_names()[turned.template_id].inverted
        assert turned.references == ("Fine.",) == (turned.messages[-1].text,)
    thought = example(record, templates="first", style=Style(rationale=True))
    assert thought.messages[-1].text == "It says fine.\nThe answer is good"
    assert thought.messages[0].text.endswith("\nThink step by step, then give the answer.")


def test_exemplars_are_turns_that_bear_no_loss():
    others = [replace(VQA, id=f"s/{at}", text=f"q{at}", media=(Medium("image", f"{at}.jpg"),)) for at in (2, 3)]
    made = example(VQA, templates="first", exemplars=others)
    assert made.exemplar_ids == ("s/2", "s/3")
    assert [message.role for message in made.messages] == ["user", "assistant"] * 3
    assert [message.train for message in made.messages if message.role == "assistant"] == [False, False, True]
    assert [medium.path for medium in made.media] == ["2.jpg", "3.jpg", "a.jpg"]
    assert made.messages[0].text.startswith("q2\n") and made.group != example(VQA).group


def jinja(text: str, choices: str = "", **facts) -> Template:
    return Template("t", text, "", form="jinja", choices=choices, raw=True, **facts)


def from_file(record: Record, *templates: Template, **options):
    return make_example(record, wordings=Wordings(file=templates), render=in_process, **options)


def in_process(template: Template, values, salt: str):
    from mmtune.prompts.jinja_child import PromptEnvironment, answer

    said = answer(
        PromptEnvironment(), {"source": template.prompt, "choices": template.choices, "values": values, "salt": salt}
    )
    if "error" in said:
        return Reject("", "", said["error"], said["detail"])
    answers = tuple(text for text in said["answers"] if text)
    return Filled(said["prompt"], next(iter(answers), ""), answers, tuple(said["options"]))


def test_a_template_of_a_file_says_what_is_right():
    record = Record(
        "s/1", "s", "sentiment_analysis", "train", text="Fine {{ x }}.", references=("pos",), options=("neg", "pos")
    )
    made = from_file(record, jinja("{{text}} Liked? ||| {{answer_choices[label]}}", "No ||| Yes"))
    assert made.messages[0].text == "Fine {{ x }}. Liked?" and made.messages[1].text == "Yes"
    assert made.references == ("Yes",) and made.options == ("No", "Yes") and made.metric == "accuracy"
    squad = replace(record, task="question_answering", context="Cats sleep.", references=("Cats",), options=())
    made = from_file(squad, jinja("{{context}} {{text}} ||| {{answers.text[0]}}"))
    assert made.messages[0].text == "Cats sleep. Fine {{ x }}." and made.references == ("Cats",)
    raw = replace(record, fields={"text": "RAW"})
    assert from_file(raw, jinja("{{text}} ||| x")).messages[0].text == "RAW"


def test_a_conditional_template_gives_way():
    record = Record("s/1", "s", "instruction", "train", text="q", references=("a",), fields={"n": 2})
    one = replace(jinja("{% if n == 1 %}one ||| a{% endif %}"), id="one")
    two = replace(jinja("{% if n == 2 %}two ||| a{% endif %}"), id="two")
    for at in range(8):
        assert from_file(replace(record, id=f"s/{at}"), one, two).template_id == "two"
    refused = from_file(record, one)
    assert refused.reason == "template_empty" and "one" in refused.detail


def test_a_file_whose_templates_name_what_no_row_has_says_what():
    refused = from_file(VQA, Template("t", "{nothing} {text}", raw=True), Template("u", "{none} {why}", raw=True))
    assert refused.reason == "template_empty"
    assert "'t' names nothing; 'u' names none, why; the row has " in refused.detail and "question" in refused.detail


@pytest.mark.parametrize(
    ("fields", "template", "reason"),
    [
        ({}, jinja("{{ nothing }} ||| x"), "missing_field"),
        ({}, Template("t", "{nothing}", raw=True), "template_empty"),
        (
            {"fields": {"gold": "the right one"}},
            jinja("Is it {{ references[0] }}? ||| {{ answer }}"),
            "answer_in_prompt",
        ),
        ({}, Template("t", "Say {answer}"), "answer_in_prompt"),
        ({}, jinja("{% if false %}{{ media }}{% endif %} {{ text }} ||| {{ answer }}"), "media_dropped"),
        ({}, jinja("{{ media }} {{ media }} ||| {{ answer }}"), "media_dropped"),
        ({"options": ("a", " ")}, Template("t", "{question} {options}"), "empty_option"),
    ],
)
def test_what_a_row_is_refused_for(fields: dict, template: Template, reason: str):
    refused = from_file(replace(VQA, references=("the right one",), target="", **fields), template)
    assert isinstance(refused, Reject) and refused.reason == reason and refused.id == VQA.id and refused.detail


def test_an_answer_that_the_data_say_is_no_leak():
    record = replace(VQA, task="question_answering", context="It is the right one.", references=("the right one",))
    made = make_example(replace(record, target=""), wordings=Wordings("first"))
    assert isinstance(made, Example)


def test_media_stand_where_a_template_says():
    made = example(VQA, template="vqa_media_first")
    assert made.messages[0].parts[0] == VQA.media[0]
    shown = from_file(VQA, jinja("Before {{ media }} after ||| tree"))
    assert shown.messages[0].parts == (TextPart("Before "), VQA.media[0], TextPart(" after"))


def test_a_named_template_that_does_not_fit_is_a_refusal():
    refused = make_example(VQA, wordings=Wordings(name="sentiment_choose"))
    assert isinstance(refused, Reject) and refused.reason == "missing_field" and "options" in refused.detail


def test_tasks_are_known_by_name():
    for task in TASKS_OF_TEN:
        check_task(task)
    with pytest.raises(RecipeError) as error:
        check_task("sentiment_analisis")
    assert error.value.exit_code == 2 and "did you mean 'sentiment_analysis'" in error.value.hint
    assert all(task in error.value.hint for task in TASKS_OF_TEN)


def test_labels_in_words():
    words = {"0": ("terrible", "bad"), "1": ("great",)}
    record = Record("s/1", "s", "sentiment_analysis", "train", text="t", references=("0",), options=("0", "1"))
    made = verbalized(record, words)
    assert isinstance(made, Record)
    assert made.options == ("terrible", "great") and made.references == ("terrible", "bad")
    assert example(made, templates="first").messages[-1].text == "terrible"
    refused = verbalized(replace(record, references=("2",)), words)
    assert isinstance(refused, Reject) and refused.reason == "unknown_label"
    for wrong in ({"0": ("a",), "1": ("a",)}, {"0": ()}, {"0": (" ",)}):
        with pytest.raises(RecipeError) as error:
            check_verbalizer("s", wrong)
        assert error.value.code == "bad_verbalizer"

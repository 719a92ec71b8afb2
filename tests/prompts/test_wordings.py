"""Further wordings of a row: each is the row that its template alone would have built."""

from dataclasses import replace

import pytest

from mmtune.prompts.forms import Template
from mmtune.prompts.jinja_process import JinjaProcess
from mmtune.prompts.schema import example_to_row, row_to_example
from mmtune.prompts.template import POOLS, Wordings, make_example
from mmtune.prompts.wordings import WORDINGS, worded, wordings_of, wordings_text
from mmtune.records import Medium, Record, marked

REVIEW = Record(
    "r/1",
    "r",
    "sentiment_analysis",
    "val",
    text="a {film} of \0 joy",
    options=("bad", "good"),
    references=("good",),
    fields={"text": "a {film}", "label": "good"},
)
PICTURE = Record(
    "p/1",
    "p",
    "vqa",
    "val",
    text="Is it red?",
    context="Look well.",
    media=(Medium("image", "a.jpg"), Medium("image", "b.jpg")),
    references=("yes",),
    options=("yes", "no"),
)
FILE = (
    Template("mine", "Say {question}: {options}{soft: 3}", task=""),
    Template("theirs", "{{ text }} Good? ||| {{ answer_choices[1] }}", choices="No ||| Yes", form="jinja", raw=True),
    Template("inverted", "Write a review", "{question}", inverted=True),
)


@pytest.mark.parametrize(
    ("record", "wordings"),
    [(REVIEW, Wordings()), (PICTURE, Wordings()), (REVIEW, Wordings(file=FILE)), (REVIEW, Wordings("first"))],
)
def test_a_row_in_one_of_its_wordings_is_the_row_of_that_template(record: Record, wordings: Wordings):
    render, empty = JinjaProcess(), replace(record, text="N/A", context="", media=())
    own = make_example(record, seed=3, wordings=wordings, system="Be kind.", render=render)
    text = wordings_text(record, own, "all", seed=3, wordings=wordings, render=render, empty=empty)
    kept = replace(own, metadata={**own.metadata, WORDINGS: text})
    kept = row_to_example(example_to_row(kept))
    names = list(wordings_of(kept))
    assert names == ["mine", "theirs"] if wordings.file else len(names) > 2
    for name in names:
        alone = make_example(record, seed=3, wordings=replace(wordings, name=name), system="Be kind.", render=render)
        free = make_example(empty, seed=3, wordings=replace(wordings, name=name), render=render)
        found = worded(kept, name)
        assert found.metadata["content_free"] == marked(free.messages[-2].parts)
        assert replace(found, metadata={}) == replace(alone, metadata={}, metric=own.metric)


def test_only_what_is_named_is_kept_and_inverted_templates_never():
    own = make_example(REVIEW)
    pool = [one.id for one in POOLS["sentiment_analysis"]]
    for kept, wanted in (((pool[2], "vqa_plain"), {pool[2]}), ((), set())):
        text = wordings_text(REVIEW, own, kept, seed=0, wordings=Wordings())
        assert set(wordings_of(replace(own, metadata={WORDINGS: text}))) == wanted
    assert not wordings_of(own)
    whole = wordings_text(REVIEW, own, "all", seed=0, wordings=Wordings())
    inverted = {one.id for one in POOLS["sentiment_analysis"] if one.inverted}
    assert inverted and not inverted & set(wordings_of(replace(own, metadata={WORDINGS: whole})))

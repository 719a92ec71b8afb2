"""Templates that mix fixed and learned words: ``{soft: n}`` becomes places, from a template and nothing else."""

import json
from pathlib import Path

import pytest

from mmtune.errors import DataError
from mmtune.prompts.jinja_process import JinjaProcess
from mmtune.prompts.schema import example_to_row, row_to_example
from mmtune.prompts.template import Wordings, make_example
from mmtune.prompts.template_file import load_templates
from mmtune.records import Medium, Record, SoftPart, TextPart, marked, parts_of


def templates(tmp_path: Path, prompt: str):
    path = tmp_path / "t.yaml"
    path.write_text(f"mine:\n  - [{prompt!r}, '{{answer}}']\n")
    return Wordings("first", None, load_templates(path))


def record(text: str = "Which one?") -> Record:
    media = (Medium("image", "a.png", width=4, height=4),)
    return Record("s/1", "s", "vqa", "train", text=text, media=media, references=("red",), target="red")


def shown(tmp_path: Path, prompt: str, text: str = "Which one?"):
    made = make_example(record(text), wordings=templates(tmp_path, prompt))
    assert row_to_example(example_to_row(made)) == made
    return made.messages[0].parts


def test_soft_tokens_stand_where_the_template_has_them(tmp_path: Path):
    found = shown(tmp_path, "{soft: 4}Look: {media}{soft:2} {question}")
    assert found[0] == SoftPart(4) and found[1] == TextPart("Look: ") and isinstance(found[2], Medium)
    assert found[3:] == (SoftPart(2), TextPart(" Which one?"))


def test_a_template_of_soft_tokens_alone_says_something(tmp_path: Path):
    assert shown(tmp_path, "{soft: 8}")[1:] == (SoftPart(8),)


def test_the_text_of_a_row_is_never_read_as_soft_tokens(tmp_path: Path):
    found = shown(tmp_path, "{question} {soft: 2}", text="Say {soft: 3}, please")
    assert found[1:] == (TextPart("Say {soft: 3}, please "), SoftPart(2))


@pytest.mark.parametrize("prompt", ["{soft: x} {question}", "{soft: 0}", "{soft!r: 4}", "{soft: 1000}"])
def test_what_is_no_number_of_tokens_is_refused(tmp_path: Path, prompt: str):
    with pytest.raises(DataError, match="no plain name"):
        templates(tmp_path, prompt)


def in_jinja(tmp_path: Path, text: str):
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps({"templates": {"a": {"name": "mine", "jinja": text}}}))
    process = JinjaProcess()
    try:
        return make_example(record("soft(3)"), wordings=Wordings("first", None, load_templates(path)), render=process)
    finally:
        process.close()


def test_soft_tokens_stand_where_a_jinja_template_calls_for_them(tmp_path: Path):
    made = in_jinja(
        tmp_path, "{{ soft(4) }}Look: {{ media }}{% for n in [2] %}{{ soft(n) }}{% endfor %} {{text}} ||| red"
    )
    assert row_to_example(example_to_row(made)) == made
    found = made.messages[0].parts
    assert found[0] == SoftPart(4) and found[1] == TextPart("Look: ") and isinstance(found[2], Medium)
    # What the data say is data.
    assert found[3:] == (SoftPart(2), TextPart(" soft(3)"))


@pytest.mark.parametrize("text", ["{{ soft(0) }} ||| x", "{{ soft('4') }} ||| x", "{{ text }} ||| {{ soft(2) }}"])
def test_soft_tokens_that_cannot_be_are_refused_in_jinja(tmp_path: Path, text: str):
    with pytest.raises(DataError, match=r"soft") as caught:
        in_jinja(tmp_path, text)
    assert caught.value.code == "template_refused"


def test_soft_tokens_are_not_answered_with(tmp_path: Path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"mine": [["{question}", "{soft: 2} {answer}"]]}))
    with pytest.raises(DataError, match="soft tokens in the target"):
        load_templates(path)


def test_a_marked_prompt_is_its_parts_without_media():
    parts = (SoftPart(3), TextPart("Look: "), Medium("image", "a.png"), SoftPart(2), TextPart(" which?"))
    assert parts_of(marked(parts)) == tuple(part for part in parts if not isinstance(part, Medium))
    assert parts_of("plain") == (TextPart("plain"),) and parts_of("") == ()

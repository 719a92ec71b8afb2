"""Templates of strangers: PromptSource's own strings, the sandbox, and what is refused by name."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from mmtune.errors import DataError
from mmtune.prompts import jinja_process
from mmtune.prompts.forms import Filled, Template
from mmtune.prompts.jinja_child import PromptEnvironment, render
from mmtune.prompts.jinja_process import JinjaProcess
from mmtune.prompts.template_file import load_templates
from mmtune.records import Reject

T0 = {
    # rendered file: (PromptSource file, template, the prompt as a pattern with the fields as groups)
    "ag_news_classify_with_choices_question_first": (
        "ag_news",
        "classify_with_choices_question_first",
        r"Is this a piece of news regarding world politics, [^?]*\?\n(?P<text>.*)",
    ),
    "amazon_polarity_Is_this_review": (
        "amazon_polarity",
        "Is_this_review",
        r"Title: (?P<title>[^\n]*)\nReview: (?P<content>.*)\nIs the review positive or negative\?",
    ),
    "imdb_Reviewer_Expressed_Sentiment": (
        "imdb",
        "Reviewer Expressed Sentiment",
        r"(?P<text>.*) What is the sentiment expressed by the reviewer for the movie\?",
    ),
    "samsum_Sum_up_the_following_dialogue": (
        "samsum",
        "Sum up the following dialogue",
        r"Sum up the following dialogue: \n(?P<dialogue>.*)",
    ),
    "xsum_DOC_boils_down_to_simple_idea_that": (
        "xsum",
        "DOC_boils_down_to_simple_idea_that",
        r"(?P<document>.*)\nThis boils down to the simple idea that",
    ),
    "yelp_review_full_format_score": (
        "yelp_review_full",
        "format_score",
        r"Review text:\n(?P<text>.*)\n\nReview score \(between 1 and 5\):",
    ),
    "glue_qqp_answer": (
        "glue__qqp",
        "answer",
        r'Can an answer to "(?P<question1>.*)" also be used to answer "(?P<question2>.*)"\?',
    ),
    "common_gen_Given_concepts_type_1": (
        "common_gen",
        "Given concepts type 1",
        r"Given the list of concepts: (?P<concepts>.*); \nGenerate a sentence with all the concepts :",
    ),
    "rotten_tomatoes_Reviewer_Enjoyment": (
        "rotten_tomatoes",
        "Reviewer Enjoyment",
        r"(?P<text>.*) How does the reviewer feel about the movie\?",
    ),
}


def jinja(text: str, choices: str = "") -> Template:
    return Template("t", text, "", form="jinja", choices=choices)


@pytest.fixture(scope="module")
def process():
    made = JinjaProcess()
    yield made
    made.close()


@pytest.mark.parametrize("name", T0)
def test_the_strings_are_those_that_promptsource_rendered(name: str, shared_datasets: Path, process: JinjaProcess):
    file, wanted, pattern = T0[name]
    templates = {one.id: one for one in load_templates(shared_datasets / f"promptsource_templates/{file}.yaml")}
    template = templates[wanted]
    choices = [text.strip() for text in template.choices.split("|||")]
    lines = (shared_datasets / f"t0_templates/{name}.jsonl").read_text("utf-8").splitlines()
    assert len(lines) >= 30
    for line in lines:
        row = json.loads(line)
        prompt, answer = row["prompt"].removesuffix("\n"), row["completion"].removesuffix("<|endoftext|>")
        match = re.fullmatch(pattern, prompt, re.DOTALL)
        assert match, prompt
        values = match.groupdict()
        values |= {"label": choices.index(answer)} if answer in choices else {"summary": answer, "target": answer}
        if "concepts" in values:
            values["concepts"] = values["concepts"].split(", ")
        made = process(template, values, "salt")
        assert isinstance(made, Filled), made
        assert (made.prompt, made.taught) == (prompt, answer)


def test_every_shared_template_compiles_and_its_metadata_are_read(shared_datasets: Path):
    made, found = PromptEnvironment(), []
    for path in sorted((shared_datasets / "promptsource_templates").glob("*.yaml")):
        templates = load_templates(path)
        found += templates
        for template in templates:
            made.compiled(template.prompt)
            assert template.form == "jinja" and template.raw
    assert len(found) == 149
    assert sum(one.inverted for one in found) == 32  # as many as say `original_task: false`
    squad = {one.id: one for one in load_templates(shared_datasets / "promptsource_templates/squad.yaml")}
    assert squad["jeopardy"].inverted and not squad["answer_the_question"].inverted


def test_bars_and_braces_of_the_data_are_data(process: JinjaProcess):
    made = process(jinja("{{text}} ? ||| {{answer_choices[1]}}", "a ||| b {{x}}"), {"text": "1|||{{ x }}", "x": 2}, "s")
    assert made == Filled("1|||{{ x }} ?", "b 2", ("b 2",), ("a", "b 2"))


def test_choice_draws_by_the_row():
    made = PromptEnvironment()
    drawn = [render(made, "{{ items | choice }}", "", {"items": list(range(50))}, salt)["prompt"] for salt in "aabc"]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    fixed = [render(made, "{{ [0, 1, 2, 3] | choice }}", "", {}, str(row))["prompt"] for row in range(20)]
    assert len(set(fixed)) == 4
    assert render(made, "{{ [1, 2, 2, 3, 3] | most_frequent | join(',') }}", "", {}, "")["prompt"] == "2,3"
    assert [render(made, "{{ zip([1], [2]) | list }}", "", {}, "")["prompt"]] == ["[(1, 2)]"]
    assert random.Random("a").random() == random.Random("a").random()


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.center(1000000000) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ zip.__globals__ }}",
        "{{ cycler['__init__']['__globals__'] }}",
        "{{ (''|attr('__class__')).x }}",
    ],
)
def test_a_template_that_must_not_run_is_refused_soon(text: str, process: JinjaProcess):
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        process(jinja(text), {}, "s")
    assert error.value.code == "template_refused" and error.value.exit_code == 3
    assert time.monotonic() - start < 5
    # The process serves on, or another one does.
    assert process(jinja("{{ 1 }} ||| 2"), {}, "s") == Filled("1", "2", ("2",))


def test_faults_are_told_apart(process: JinjaProcess):
    with pytest.raises(DataError) as error:
        process(jinja("{% if %}"), {}, "s")
    assert error.value.code == "template_syntax"
    missing = process(jinja("{{ nothing }} ||| x"), {}, "s")
    assert isinstance(missing, Reject) and missing.reason == "missing_field" and "nothing" in missing.detail
    failed = process(jinja("{{ answer_choices[label] }}", "a ||| b"), {"label": 5}, "s")
    assert isinstance(failed, Reject) and failed.reason == "missing_field"
    failed = process(jinja("{{ 1 // 0 }}"), {}, "s")
    assert isinstance(failed, Reject) and failed.reason == "template_failed"


def test_no_process_is_left_behind():
    made = JinjaProcess()
    made(jinja("a ||| b"), {}, "s")
    child = made._child
    assert child is not None and child.poll() is None
    del made
    assert child.poll() is not None
    assert jinja_process.JinjaProcess()._child is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "holds no mapping"),
        ("templates: {a: {name: x}}", "no `jinja` text"),
        ("rte: [['{a}']]", "no pair"),
        ("rte: [['{a', 'b']]", "brace"),
        ("rte: [['{a.b}', 'b']]", "plain name"),
        ("rte: [['{answer}?', '{answer}']]", "answer in the question"),
        ("rte: [['no slot', 'x']]", r"same words for every row at rte\[0\]"),
        ("rte: [['{question}', '']]", "same words for every row"),
        ("templates: {a: {jinja: 'no slot ||| x'}}", "same words for every row in 'a'"),
        ("{}", "no template"),
        ("a: [\n", "no YAML"),
        ("a: &x [['{q}', '{answer}']]\nb: *x", "aliases"),
        ("templates: {a: {name: x, jinja: a}, b: {name: x, jinja: b}}", "twice"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, why: str):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=why) as error:
        load_templates(path)
    assert error.value.code == "bad_templates"


def test_flan_pairs(tmp_path: Path):
    path = tmp_path / "flan.json"
    pairs = [['{premise}\n{{so}} "{hypothesis}"?\n\n{options_}', "{answer}"], ["{answer}: write one", "{premise}"]]
    path.write_text(json.dumps({"rte": pairs}))
    first, second = load_templates(path)
    assert (first.id, first.form, first.inverted, first.shows_options) == ("rte_0", "slots", False, True)
    assert second.inverted and second.slots == {"answer", "premise"}

"""Rendered strings beside independent references: PromptSource's rules in plain Jinja, T0's published rows, FLAN's.

The templates of T0's rows whose PromptSource file is not among the shared ones are written here after the rows
themselves; what is compared with the rows is every blank, line break and branch that a renderer may get wrong.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest

from mmtune.prompts.forms import Filled, Template
from mmtune.prompts.jinja_process import JinjaProcess
from mmtune.prompts.template import Style, Wordings, make_example
from mmtune.prompts.template_file import load_templates
from mmtune.readers import find_reader
from mmtune.readers.source import SourceFiles
from mmtune.records import Record

LONG = "Ein „Zitat“ with {braces}, <br /> and\n\ttwo lines.  "
ENDINGS = ["falls down", "|||", "flies away", "sings"]
ROWS: dict[str, list[dict[str, Any]]] = {
    # PromptSource file: rows with its data set's columns
    "ag_news": [{"text": f"{LONG} {label}", "label": label} for label in range(4)],
    "amazon_polarity": [{"title": "So||| so", "content": LONG, "label": label} for label in range(2)],
    "cnn_dailymail__3.0.0": [{"article": LONG, "highlights": "One .\nTwo ."}],
    "common_gen": [{"concepts": ["ski", "mountain", "skier"], "target": "A skier skis down."}],
    "duorc__SelfRC": [
        {"plot": LONG, "title": "Kes", "question": "Who?", "answers": ["a boy", "Billy"], "no_answer": False},
        {"plot": LONG, "title": "Kes", "question": "Why?", "answers": [], "no_answer": True},
    ],
    "glue__qqp": [{"question1": "Is it?", "question2": '"It" is?', "label": label} for label in range(2)],
    "glue__rte": [{"sentence1": LONG, "sentence2": "So.", "label": label} for label in range(2)],
    "glue__sst2": [{"sentence": LONG, "label": label} for label in range(2)],
    "hellaswag": [
        {
            "activity_label": "Running",
            "ctx": "A man runs. He",
            "ctx_a": "A man runs.",
            "ctx_b": "he",
            "endings": ENDINGS,
            "label": label,
        }
        for label in "0123"
    ],
    "imdb": [{"text": LONG, "label": label} for label in range(2)],
    "rotten_tomatoes": [{"text": LONG, "label": label} for label in range(2)],
    "samsum": [{"dialogue": "A: Hi!\r\nB: Bye.", "summary": "They meet."}],
    "squad": [{"context": LONG, "question": "Who sings?", "answers": {"text": ["a bird"], "answer_start": [3]}}],
    "super_glue__boolq": [{"passage": LONG, "question": "is it so", "label": label} for label in range(2)],
    "trec": [{"text": "What is a mile ?", "coarse_label": kind, "fine_label": kind} for kind in range(6)],
    "xsum": [{"document": LONG, "summary": "It rained."}],
    "yelp_review_full": [{"text": LONG, "label": label} for label in range(5)],
}


@pytest.fixture(scope="module")
def process():
    made = JinjaProcess()
    yield made
    made.close()


def in_plain_jinja(template: Template, row: dict[str, Any], salt: str) -> tuple[str, list[str], list[str]] | None:
    """Returns prompt, answers and options by PromptSource's published rules; None where a name is not there."""
    dice = random.Random(salt)
    made = jinja2.Environment(undefined=jinja2.StrictUndefined)
    made.globals["zip"] = zip
    made.filters["choice"] = jinja2.pass_context(lambda context, items: dice.choice(list(items)))
    made.filters["highlight"] = made.filters["most_frequent"] = lambda value: value
    safe = {name: value.replace("|||", "\x01") if isinstance(value, str) else value for name, value in row.items()}
    try:
        options = None
        if template.choices:
            options = [part.strip() for part in made.from_string(template.choices).render(safe).split("|||")]
        text = made.from_string(template.prompt).render({**safe, "answer_choices": options})
    except jinja2.UndefinedError:
        return None
    prompt, *answers = [part.strip().replace("\x01", "|||") for part in text.split("|||")]
    return prompt, [answer for answer in answers if answer], [one.replace("\x01", "|||") for one in options or []]


def test_every_promptsource_template_renders_as_plain_jinja_does(shared_datasets: Path, process: JinjaProcess):
    rendered = said = 0
    folder = shared_datasets / "promptsource_templates"
    assert {path.stem for path in folder.glob("*.yaml")} == set(ROWS)
    for name, rows in ROWS.items():
        for template in load_templates(folder / f"{name}.yaml"):
            for at, row in enumerate(rows):
                expected, made = in_plain_jinja(template, row, str(at)), process(template, row, str(at))
                assert (expected is None) == (not isinstance(made, Filled)), (name, template.id, made)
                if expected is None:
                    continue
                assert isinstance(made, Filled)
                assert (made.prompt, list(made.references), list(made.options)) == expected, (name, template.id)
                rendered, said = rendered + 1, said + bool(expected[0] and expected[1])
    # What is conditional says nothing of other rows.
    assert rendered > 300 and said > 0.7 * rendered


T0 = {
    # rows: (the template, choices, the prompt as a pattern with the fields as groups, the field of the answer)
    "adversarial_qa_dbert_tell_what_it_is": (
        'I know that the answer to the question "{{ question }}" is in "{{ context }}". Can you tell me what it is?'
        " ||| {{ answer }}",
        "",
        r'I know that the answer to the question "(?P<question>.*?)" is in "(?P<context>.*)"\. Can you tell .*',
    ),
    "app_reviews_generate_review": (
        "Generate a {{ star }}-star review (1 being lowest and 5 being highest) about an app with package"
        " {{ package }}.\n|||\n{{ answer }}",
        "",
        r"Generate a (?P<star>\d)-star review .* with package (?P<package>.*)\.",
    ),
    "commonsense_qa_answer_to_question": (
        "Use the following options to predict a possible question for them:\n\n"
        "{% for one in options %}\n- {{ one }}\n{% endfor %}\n|||\n{{ answer }}\n",
        "",
        r"Use the following options [^:]*:\n\n\n- (?P<options>.*)",
    ),
    "cosmos_qa_context_answer_to_question": (
        "Based on the context and the answer, generate a question. \n\nContext: {{ context }}\n\nAnswer:\n"
        "{% for one in [known] %}\n{{ one }}\n{% endfor %}\n|||\n{{ answer }}",
        "",
        r"Based on .*? \n\nContext: (?P<context>.*)\n\nAnswer:\n\n(?P<known>.*)",
    ),
    "dbpedia_14_pick_one_category_for_the_following_text": (
        "Pick one category for the following text. The options are - {{ answer_choices[:-1] | join(', ') | lower }}"
        " or {{ answer_choices[-1] | lower }}. {{ title }} - {{ content }} ||| {{ answer_choices[label] }}",
        "Company ||| Educational Institution ||| Artist ||| Athlete ||| Office Holder ||| Mean Of Transportation |||"
        " Building ||| Natural Place ||| Village ||| Animal ||| Plant ||| Album ||| Film ||| Written Work",
        r"Pick one .* or written work\. (?P<title>.*?) - (?P<content>.*)",
    ),
    "dream_answer_to_dialogue": (
        'Given the question "{{ question }}" and the answer "{{ known }}", write a conversation that might have'
        ' happened.\n|||\n{{ turns | join("\n\n") }}',
        "",
        r'Given the question "(?P<question>.*)" and the answer "(?P<known>.*)", write .*',
    ),
    "gigaword_in_a_nutshell": (
        "{{ document }} In a nutshell, ||| {{ answer }}",
        "",
        r"(?P<document>.*) In a nutshell,",
    ),
    "kilt_tasks_hotpotqa_straighforward_qa": (
        "{% if answer %}{{ question }}\n|||\n{{ answer }}{% endif %}",
        "",
        r"(?P<question>.*)",
    ),
    "paws_labeled_final_Rewrite_no_label": (
        "Sentence 1: {{ sentence1 }}\nSentence 2: {{ sentence2 }}\nQuestion: Can we rewrite Sentence 1 to Sentence 2?"
        "\n|||\n{{ answer_choices[label] }}",
        "No ||| Yes",
        r"Sentence 1: (?P<sentence1>.*)\nSentence 2: (?P<sentence2>.*)\nQuestion: .*",
    ),
    "qasc_qa_with_separated_facts_3": (
        "Fact 1: {{ fact1[0] | capitalize }}{{ fact1[1:] | trim | trim('.') }}.\n\nFact 2: {{ fact2 }}\n\n"
        "Given the two facts above, {{ question }}\n|||\n{{ answer }}",
        "",
        r"Fact 1: (?P<fact1>.*)\n\nFact 2: (?P<fact2>.*)\n\nGiven the two facts above, (?P<question>.*)",
    ),
    "quartz_answer_question_below": (
        "Answer the question below:\n\n\n{{ question }}\n\n{% if fact %}\nAssuming that:\n\n{{ fact }}\n{% endif %}"
        " ||| {{ answer }}",
        "",
        r"Answer the question below:\n\n\n(?P<question>.*)\n\n\nAssuming that:\n\n(?P<fact>.*)",
    ),
    "social_i_qa_Show_choices_and_generate_answer": (
        "{{ context }}\n\nGiven the context: {{ question }}\n\nPossible answers: {{ answer_choices | join(', ') }}"
        "\n|||\n{{ answer_choices[label | int] }}",
        "{{ first }}|||{{ second }}|||{{ third }}",
        r"(?P<context>.*)\n\nGiven the context: (?P<question>.*)\n\nPossible answers: (?P<answers>.*)",
    ),
    "wiki_bio_guess_person": (
        "{% for one in table %}\n{% if one.shown %}\n- {{ one.head }} is {{ one.content }}\n{% endif %}\n{% endfor %}"
        "\n\nGiven the details above, guess who could this information be about.\n|||\n{{ answer }}",
        "",
        r"(?P<table>.*)\n\nGiven the details above, .*",
    ),
    "wiqa_what_is_the_missing_first_step": (
        "What is the missing first step of the following process:\n\n-  {{ steps[1:] | join('\n- ') }}\n|||\n"
        "{{ steps | first }}",
        "",
        r"What is the missing [^:]*:\n\n-  (?P<steps>.*)",
    ),
}


def fields_of(name: str, prompt: str, answer: str) -> dict[str, Any]:
    """Returns the columns that a row of T0 must have been made of."""
    _, choices, pattern = T0[name]
    match = re.fullmatch(pattern, prompt, re.DOTALL)
    assert match, prompt
    values: dict[str, Any] = {**match.groupdict(), "answer": answer, "turns": answer.split("\n\n")}
    if name == "commonsense_qa_answer_to_question":
        values["options"] = values["options"].split("\n\n- ")
    if name == "wiqa_what_is_the_missing_first_step":
        values["steps"] = [answer, *values["steps"].split("\n- ")]
    if name == "social_i_qa_Show_choices_and_generate_answer":
        # A comma may stand within an answer, so that the answer itself says where it ends.
        before, after = (part.split(", ") for part in values["answers"].split(answer, 1))
        whole = [part for part in (*before[:-1], answer, *after[1:]) if part]
        values["first"], values["second"], values["third"] = whole
        values["label"] = str(whole.index(answer))
    elif choices:
        values["label"] = [text.strip() for text in choices.split("|||")].index(answer)
    if name == "wiki_bio_guess_person":
        values["table"] = list(lines_of_table(values["table"]))
    return values


def lines_of_table(text: str):
    """Yields the lines of a table that are shown, and those left out, of which two line breaks tell."""
    pieces = re.split(r"- ([^\n]*?) is ([^\n]*)", text)
    breaks = [len(piece) for piece in pieces[::3]]
    hidden = {"shown": False}
    yield from [hidden] * (breaks[0] // 2)
    for at, (head, content) in enumerate(zip(pieces[1::3], pieces[2::3], strict=True), start=1):
        yield {"shown": True, "head": head, "content": content}
        yield from [hidden] * ((breaks[at] - (2 if at == len(breaks) - 1 else 4)) // 2)


@pytest.mark.parametrize("name", T0)
def test_rows_of_t0_are_rendered_to_the_byte(name: str, shared_datasets: Path, process: JinjaProcess):
    template = Template("t", T0[name][0], "", form="jinja", choices=T0[name][1])
    lines = (shared_datasets / f"t0_templates/{name}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 40
    for row in rows:
        prompt, answer = row["prompt"].removesuffix("\n"), row["completion"].removesuffix("<|endoftext|>")
        made = process(template, fields_of(name, prompt, answer), "salt")
        assert isinstance(made, Filled), made
        assert (made.prompt, made.taught) == (prompt.strip(), answer.strip())


def test_every_row_of_t0_is_taught_as_it_was_published(shared_datasets: Path):
    folder = shared_datasets / "t0_templates"
    files = sorted(folder.glob("*.jsonl"))
    published = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines() if line.strip()]
    made = [make_example(one) for one in find_reader("t0")(SourceFiles(id="t0", split="train", path=folder))]
    assert len(files) == 24 and len(made) == len(published) == 920
    for row, example in zip(published, made, strict=True):
        asked, taught = example.messages
        assert asked.text == row["prompt"].strip()
        assert taught.text == row["completion"].removesuffix("<|endoftext|>").strip()


FLAN = [
    ['{title}\n{text}\n\nDoes this say "{claim}"?\n\n{options_}', "{answer}"],
    ["Is the claim ({claim}) what {title} says?\n{options_}\n{text}", "{answer}"],
    ["{text}{claim}???", "{answer}."],
    ["{stars} of 5: {title}", "{answer}"],
    ["Write a claim that {title} says ({answer}).", "{claim}"],
    ["Ask anything.", "Title: {title}\n\nClaim: {claim}"],
]


def in_flan(pattern: str, row: dict[str, Any]) -> str:
    """Returns a pattern filled as FLAN's preprocessors do: cut at names in single braces, values as strings."""
    listed = "OPTIONS:\n- " + "\n- ".join(row["options"])
    values = {**row, "options_": listed}
    parts = re.split(r"(\{\w*\})", pattern)
    return "".join(str(values[part[1:-1]]) if re.fullmatch(r"\{\w+\}", part) else part for part in parts)


@pytest.mark.parametrize("at", range(len(FLAN)))
def test_flans_pairs_give_flans_strings(tmp_path: Path, at: int):
    path = tmp_path / "flan.json"
    path.write_text(json.dumps({"says": FLAN}))
    templates = load_templates(path)
    row = {"title": "A {tale}", "text": f"{LONG}%s\\n", "claim": "It is {so}", "stars": 4, "answer": "maybe not"}
    row["options"] = ["yes", "maybe not", "OPTIONS:"]
    record = Record(
        "s/1",
        "s",
        "question_answering",
        "train",
        text=row["claim"],
        context=row["text"],
        references=(row["answer"],),
        options=tuple(row["options"]),
        fields=row,
    )
    wordings = Wordings(name=f"says_{at}", file=templates)
    made = make_example(record, wordings=wordings, style=Style(inverted=templates[at].inverted))
    asked, taught = made.messages
    assert (asked.text, taught.text) == tuple(in_flan(pattern, row) for pattern in FLAN[at])

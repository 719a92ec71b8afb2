"""build-data with template files, tasks by name and a mixture: what the rows say and what the manifest counts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmtune.encoding.processor import load_processor
from mmtune.errors import DataError, RecipeError
from mmtune.prompts.delimiters import FORMS, joined
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.template import template_names
from mmtune.recipe import Recipe
from mmtune.records import Example
from mmtune.stages import build_data as stage
from mmtune.stages.show import describe, render
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk


def table(folder: Path, name: str, count: int, split: str = "train", **fields) -> dict:
    """Writes rows whose texts name their source, and returns the recipe's entry."""
    rows = [
        {"q": f"{name} text {at}", "a": ("bad", "good")[at % 2], "why": f"{name} because {at}"} for at in range(count)
    ]
    path = folder / f"{name}-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "q", "answer": "a", "options": "=bad|good", "rationale": "why"}
    entry = {"id": name, "reader": "table", "split": split, "path": str(path), "columns": columns}
    return {**entry, "task": "sentiment_analysis", **fields}


def build(folder: Path, sources: list[dict], run: str = "run", **settings) -> tuple[list[Example], dict]:
    recipe = Recipe(run_dir=folder / run, sources=sources, build={"workers": 1, **settings})
    stage.build_data(recipe, console=Talk(quiet=True))
    folder = recipe.run_dir / "instructions"
    rows = [row for split in ("train", "val", "test") if (folder / split).is_dir() for row in rows_of(folder / split)]
    return rows, read_manifest(folder).facts


def rows_of(folder: Path) -> list[Example]:
    return [row_to_example(row) for row in open_split(folder).to_pylist()]


def said(example: Example) -> str:
    return "\n".join(message.text for message in example.messages)


MIXTURE = {
    "clusters": {"old": ["b"], "far": ["c", "d"]},
    "hold_out": ["far"],
    "cap": 200,
    "shots": {2: 0.3, 3: 0.2},
    "delimiters": 0.5,
    "chain_of_thought": 0.4,
    "options": 0.5,
    "inverted": 0.2,
    "replay": {"b": 0.25},
}


def sources_of(folder: Path) -> list[dict]:
    train = [table(folder, name, count) for name, count in (("a", 400), ("b", 40), ("c", 90), ("d", 30), ("e", 100))]
    return [*train, table(folder, "c", 20, "test"), table(folder, "a", 20, "val")]


def test_a_held_out_cluster_is_nowhere_in_training_and_the_manifest_counts_what_is(tmp_path: Path):
    rows, facts = build(tmp_path, sources_of(tmp_path), mixture=MIXTURE, content_free="N/A")
    train = [row for row in rows if row.split == "train"]
    mixture = facts["mixture"]
    # a: min(400, 200), e: 100; b replays a quarter: 300 / 0.75 = 400 rows.
    counts = {one["source"]: one["built"] for one in mixture["sources"]}
    assert counts == {"a": 200, "b": 100, "e": 100} and mixture["rows"] == len(train) == 400
    assert {one["source"]: one["repeated"] for one in mixture["sources"]} == {"a": 0, "b": 60, "e": 0}
    assert [one["share"] for one in mixture["sources"]] == [0.5, 0.25, 0.25]
    assert mixture["held_out"] == {"far": ["c", "d"]}
    assert not any("c text" in said(row) or "d text" in said(row) for row in train)
    assert {row.source for row in rows if row.split == "test"} == {"c"}
    for row in train:
        assert all(name.startswith(f"{row.source}/") and "~" not in name for name in row.exemplar_ids)
        assert row.id.partition("~")[0] not in row.exemplar_ids
        assert len(set(row.exemplar_ids)) == len(row.exemplar_ids)
        assert len([message for message in row.messages if message.role == "user"]) == len(row.exemplar_ids) + 1
    assert not any(row.exemplar_ids for row in rows if row.split != "train")
    by_id = template_names()
    inverted = [row for row in train if by_id[row.template_id].inverted]
    plain = [row for row in train if not by_id[row.template_id].inverted]
    shown = sum(by_id[row.template_id].shows_options for row in plain)
    recount = {
        "shots": {str(n): sum(len(row.exemplar_ids) == n for row in train) for n in (0, 2, 3)},
        "rationale": sum("because" in row.messages[-1].text for row in train),
        "options": shown,
        "no_options": len(plain) - shown,
        "inverted": len(inverted),
        "delimiters": Counter(row.metadata.get("delimiters", "turns") for row in train if row.exemplar_ids),
    }
    assert recount == {key: mixture[key] for key in recount}
    assert all(count > 30 for count in (*recount["shots"].values(), recount["inverted"], recount["rationale"]))
    assert set(recount["delimiters"]) == {"turns", *FORMS} and recount["delimiters"]["turns"] > 60
    assert not any("delimiters" in row.metadata for row in rows if not row.exemplar_ids)
    # Val and test are asked plainly; the content-free prompt has their template's words and not their text.
    asked = [row for row in rows if row.split != "train"]
    for row in asked:
        free = row.metadata["content_free"]
        assert "N/A" in free and f"{row.source} text" not in free
        number = row.id.rpartition("-")[2]
        assert free == row.messages[0].text.replace(f"{row.source} text {number}", "N/A")
    assert not any("content_free" in row.metadata for row in train)


def test_a_mixture_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stage, "CHUNK_ROWS", 16)
    sources = sources_of(tmp_path)
    first, _ = build(tmp_path, sources, "one", mixture=MIXTURE)
    second, _ = build(tmp_path, sources, "two", mixture=MIXTURE, workers=2)
    assert first == second


@pytest.mark.parametrize("max_length", [1024, 140])
def test_what_is_encoded_is_the_chat_templates_own_text_of_exemplars_between_delimiters(
    tmp_path: Path, tiny_vlm: Path, max_length: int
):
    mixture = {"shots": {3: 1.0}, "delimiters": 0.8}
    rows, facts = build(tmp_path, [table(tmp_path, "a", 60)], mixture=mixture)
    recipe = Recipe(run_dir=tmp_path / "run", model={"path": str(tiny_vlm)}, tokenize={"max_length": max_length})
    assert tokenize(recipe, console=Talk(quiet=True))["drops"] == {}
    examples = {row.id: row for row in rows}
    processor = load_processor(str(tiny_vlm))
    dropped = 0
    for encoded in open_split(tmp_path / "run" / "tokens" / "train").to_pylist():
        own = examples[encoded["example_ids"][0]]
        ids = np.array(encoded["input_ids"])
        # Exemplars of a random draw leave from the last drawn on: three, two, one or none are left.
        fits = []
        for left in range(4):
            turns = (*own.messages[: 2 * left], *own.messages[-2:])
            said = [{"role": turn.role, "content": turn.text} for turn in joined(turns, own.metadata.get("delimiters"))]
            fits.append(processor.tokenizer.apply_chat_template(said, tokenize=True, return_dict=False))
        shown = max(left for left in range(4) if len(fits[left]) <= max_length)
        dropped += 3 - shown
        assert ids.tolist() == fits[shown]
        assert processor.tokenizer.decode(ids[np.array(encoded["labels"]) >= 0]).startswith(own.messages[-1].text)
    assert facts["mixture"]["delimiters"]["turns"] < 30
    for at, row in enumerate(rows):
        shown = render(describe(tmp_path / "run" / "instructions", row=at))
        assert ("delimiters" in row.metadata) == (f"  delimiters {row.metadata.get('delimiters')}: " in shown)
    assert (dropped > 0) == (max_length == 140)


@pytest.mark.parametrize(
    ("mixture", "error", "code"),
    [
        ({"hold_out": ["fra"], "clusters": {"far": ["c"]}}, RecipeError, "unknown_cluster"),
        ({"clusters": {"far": ["x"]}}, RecipeError, "unknown_source"),
        ({"replay": {"c": 0.5}, "hold_out": ["c"]}, RecipeError, "unknown_source"),
        ({"hold_out": ["a", "c"]}, DataError, "no_rows"),
        ({"chain_of_thought": 0.5}, DataError, "no_rationale"),
    ],
)
def test_mixtures_that_cannot_be(tmp_path: Path, mixture: dict, error: type, code: str):
    sources = [table(tmp_path, name, 4) for name in ("a", "c")]
    for source in sources:
        del source["columns"]["rationale"]
    with pytest.raises(error) as raised:
        build(tmp_path, sources, mixture=mixture)
    assert raised.value.code == code and raised.value.hint


@pytest.mark.parametrize(
    "mixture",
    [
        {"cap": 0},
        {"shots": {2: 0.7, 3: 0.7}},
        {"replay": {"a": 0.6, "b": 0.6}},
        {"temperature": 3},
        {"delimiters": 0.5},
    ],
)
def test_settings_that_contradict_are_refused(mixture: dict):
    with pytest.raises(ValueError, match=r"cap|shots|replay|temperature|delimiters"):
        Recipe(run_dir="x", build={"mixture": mixture})


def test_an_unknown_task_is_named_with_the_known_ones(tmp_path: Path):
    with pytest.raises(RecipeError) as error:
        build(tmp_path, [table(tmp_path, "a", 2, task="sentiment")])
    assert error.value.exit_code == 2 and "sentiment_analysis" in error.value.hint
    rows, _ = build(tmp_path, [table(tmp_path, "a", 2, task="recommendation")])
    assert {row.task for row in rows} == {"recommendation"}


def test_raw_reviews_and_promptsources_file_give_t0s_own_rows(tmp_path: Path, shared_datasets: Path):
    source = {
        "id": "rt",
        "reader": "rt_polarity",
        "path": str(shared_datasets / "rt_polarity"),
        "templates": str(shared_datasets / "promptsource_templates/rotten_tomatoes.yaml"),
        "template": "Reviewer Enjoyment",
    }
    rows, _ = build(tmp_path, [source])
    built = {row.messages[0].text: row.messages[1].text for row in rows}
    lines = (shared_datasets / "t0_templates/rotten_tomatoes_Reviewer_Enjoyment.jsonl").read_text("utf-8").splitlines()
    published = [json.loads(line) for line in lines]
    found = [row for row in published if row["prompt"].removesuffix("\n") in built]
    # T0's training rows and the raw files are one corpus.
    assert len(found) == len(published) == 40
    for row in found:
        assert built[row["prompt"].removesuffix("\n")] == row["completion"].removesuffix("<|endoftext|>")


def test_templates_may_name_the_raw_columns(tmp_path: Path):
    path = tmp_path / "flan.yaml"
    path.write_text('s: [["{why} So is \\"{q}\\" fine?\\n{options_}", "{a}"]]')
    rows, _ = build(tmp_path, [table(tmp_path, "a", 2, templates=str(path))])
    assert rows[0].messages[0].text == 'a because 0 So is "a text 0" fine?\nOPTIONS:\n- bad\n- good'
    assert rows[0].messages[1].text == "bad" and rows[0].template_id == "s_0"


def test_a_changed_template_file_builds_anew(tmp_path: Path):
    path = tmp_path / "t.yaml"
    path.write_text('s: [["{text}?", "{answer}"]]')
    source = table(tmp_path, "a", 2, templates=str(path))
    assert build(tmp_path, [source])[0][0].messages[0].text == "a text 0?"
    path.write_text('s: [["{text}!", "{answer}"]]')
    assert build(tmp_path, [source])[0][0].messages[0].text == "a text 0!"


def test_a_template_that_loops_for_ever_ends_the_command_with_3(tmp_path: Path):
    jinja = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %} ||| x"
    (tmp_path / "t.yaml").write_text(f'templates: {{a: !Template {{name: loop, jinja: "{jinja}"}}}}')
    table(tmp_path, "a", 2)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "run_dir: run\nbuild: {templates: t.yaml}\n"
        "sources: [{id: a, reader: table, path: a-train.jsonl, columns: {text: q, answer: a}}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mmtune", "build-data", str(recipe), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    document = json.loads(done.stdout)
    assert done.returncode == 3 and document["error"]["code"] == "template_refused", document
    assert not (tmp_path / "run" / "instructions").exists()


def test_labels_become_words(tmp_path: Path):
    words = {"bad": ["terrible", "awful"], "good": "great"}
    rows, _ = build(tmp_path, [table(tmp_path, "a", 4, "val", verbalizer=words, template="sentiment_list")])
    assert rows[0].options == ("terrible", "great") and rows[0].references == ("terrible", "awful")
    assert rows[0].messages[0].text.startswith("OPTIONS:\n- terrible\n- great")
    with pytest.raises(RecipeError, match="stands for"):
        build(tmp_path, [table(tmp_path, "a", 4, verbalizer={"bad": "x", "good": "x"})])


def test_what_no_row_could_do_is_said(tmp_path: Path):
    lines = [{"messages": [{"role": "user", "content": f"ask {at}"}, {"role": "assistant", "content": f"yes {at}"}]}
             for at in range(12)]  # fmt: skip
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [
        {"id": "talk", "reader": "messages", "split": split, "path": str(tmp_path / "talk.jsonl")}
        for split in ("train", "val")
    ]
    mixture = {"shots": {2: 0.5}, "inverted": 0.5, "options": 0.5}
    asked, talk = Recipe(run_dir=tmp_path / "run", sources=sources, build={"mixture": mixture}), Talk(quiet=True)
    stage.build_data(asked, console=talk)
    text = "\n".join(talk.lines)
    assert "no training row shows 2 exemplars, as build asks for" in text
    assert all(f"mixture.{name}" in text for name in ("inverted", "options"))
    # These rows have no media that they could share.
    assert "train/val share 12 questions (the same text in both)" in text
    heard = Talk(quiet=True)
    sources = [table(tmp_path, "a", 40, templates="pool")]
    stage.build_data(Recipe(run_dir=tmp_path / "all", sources=sources, build={"mixture": mixture}), console=heard)
    assert not any("no training row" in line or "mixture." in line for line in heard.lines)


def test_an_unknown_template_is_named_with_those_of_its_task(tmp_path: Path):
    source = table(tmp_path, "a", 2, template="sentiment_flam")
    with pytest.raises(RecipeError, match="unknown template 'sentiment_flam'") as error:
        build(tmp_path, [source])
    assert error.value.hint.startswith("did you mean 'sentiment_flan'? templates of sentiment_analysis: sentiment_")
    assert "vqa_plain" not in error.value.hint

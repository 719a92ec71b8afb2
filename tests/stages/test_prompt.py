"""prompt from instructions/ to prompt/: rows held apart, calls counted, killed and resumed, put into rows one way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmtune.errors import CapabilityError, DataError, IntegrityError, Interrupted, RecipeError
from mmtune.evaluation.rows import question_of
from mmtune.files import file_digest
from mmtune.prompts.schema import row_to_example
from mmtune.prompts.searched import SearchedPrompt, asked_with, read_prompt
from mmtune.recipe import Finetune, Model, Prompt, Recipe
from mmtune.records import Example, Message, TextPart
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.finetune import finetune
from mmtune.stages.prompt import prompt as search_prompt
from mmtune.stages.prompt.asking import Asker, gap, metric_of, row_scores
from mmtune.stages.prompt.outcome import verdict
from mmtune.stages.prompt.rows import choose_rows
from mmtune.stages.show import describe, render
from mmtune.storage import is_finished, open_split, read_manifest
from mmtune.storage.manifest import write_manifest
from mmtune.talk import Talk
from tests.chat_server import Server

QUIET = Talk(quiet=True)
WORDS = ("red", "yellow", "blue")


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path):
    def make(name: str = "run", rows: int = 40, **settings) -> Recipe:
        for split, count in (("train", rows), ("val", 12)):
            lines = [{"q": f"{split} {at} is", "a": WORDS[at % settings.get("classes", 3)]} for at in range(count)]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources = [
            {
                "id": "t",
                "reader": "table",
                "split": split,
                "path": str(tmp_path / f"{split}.jsonl"),
                "columns": {"text": "q", "answer": "a", "options": "=red|yellow|blue"},
                "task": "sentiment_analysis",
                "template": "sentiment_what",
            }
            for split in ("train", "val")
        ]
        prompt = {"method": "ape", "budget": 80, "dev": 8, "test": 10, "minibatch": 4, "population": 2}
        return Recipe(
            run_dir=tmp_path / name,
            model={"path": str(tiny_vlm)},
            sources=sources,
            build={"workers": 1, **settings.get("build", {})},
            prompt={**prompt, **settings.get("prompt", {})},
            eval={"compare": ["base", "best_prompt"], "answer": "rank", "bootstrap": 100, **settings.get("eval", {})},
        )

    return make


def likelihood(folder: Path, prompt: str, answer: str) -> tuple[float, int]:
    """Returns the log-probability of an answer and its end by transformers alone, and the number of its tokens."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    asked = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    start = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=True)
    whole = processor.apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    # The line break after the end of the turn is no part of the answer.
    whole, at = whole[:, :-1], len(start["input_ids"][0])
    with torch.no_grad():
        logp_TV = model(input_ids=whole).logits[0].log_softmax(-1)
    logs = logp_TV[at - 1 : -1].gather(1, whole[0, at:, None])
    return float(logs.sum()), logs.numel()


def document(recipe: Recipe) -> dict:
    return json.loads((recipe.run_dir / "prompt" / "prompt.json").read_text())


def trace(recipe: Recipe, name: str = "trace") -> list[dict]:
    return [json.loads(line) for line in (recipe.run_dir / "prompt" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Ids of the rows of every call of the model."""
    calls: list[tuple[str, ...]] = []
    own = Asker.answered

    def answered(self, prompt, examples, reward):
        calls.append(tuple(one.id for one in examples))
        return own(self, prompt, examples, reward)

    monkeypatch.setattr(Asker, "answered", answered)
    return calls


@pytest.mark.parametrize("method", ["ape", "mipro"])
def test_calls_are_counted_and_test_rows_choose_nothing(recipe, counted: list, method: str):
    given = recipe(prompt={"method": method, "space": ["instruction", "exemplars"], "reward": "gap"})
    build_data(given, console=QUIET)
    result = search_prompt(given, console=QUIET)
    found = document(given)
    assert result["calls"] == found["calls"] and result["prompt"]["instruction"] == found["prompt"]["instruction"]
    spent = {name: trace(given, name)[-1]["calls"] for name in ("trace", "random")}
    assert (found["calls"]["search"], found["calls"]["random"]) == (spent["trace"], spent["random"])
    assert spent["random"] <= max(spent["trace"], 16) <= 80
    assert sum(map(len, counted)) == sum(found["calls"][name] for name in ("search", "random", "report"))
    rows = choose_rows(
        given.run_dir / "instructions",
        read_manifest(given.run_dir / "instructions"),
        sources=(),
        dev=8,
        pool=32,
        test=10,
        test_split="val",
    )
    test = {one.id for one in rows.test}
    first = next(at for at, ids in enumerate(counted) if set(ids) & test)
    # No call of the search shows a test row: they come last, whole.
    assert all(set(ids) == test for ids in counted[first:])
    assert sum(map(len, counted[:first])) >= found["calls"]["search"] + found["calls"]["random"]
    dev = {one.id for one in rows.dev}
    assert not dev & {one.id for one in rows.pool} and len(test) == 10 and len(dev) == 8
    shown = {row["id"] for row in found["prompt"]["exemplars"]}
    assert shown <= {one.id for one in rows.pool}


def test_the_document_says_what_it_was_worth(recipe):
    given = recipe()
    build_data(given, console=QUIET)
    talk = Talk(quiet=True)
    search_prompt(given, console=talk)
    found = document(given)
    assert set(found["scores"]) == {"start", "best", "random"} and set(found["differences"]) == {
        "best - start",
        "best - random",
    }
    for scores in found["scores"].values():
        assert scores["dev"]["n"] == 8 and scores["test"]["n"] == 10
        assert scores["test"]["low"] <= scores["test"]["value"] <= scores["test"]["high"]
    best = found["scores"]["best"]
    assert found["gap_dev_test"] == pytest.approx(best["dev"]["value"] - best["test"]["value"], abs=1e-3)
    # The reward of the trace is the dev score of the report.
    assert found["rewards"]["best"] * 100 == pytest.approx(best["dev"]["value"], abs=1e-3)
    assert found["rewards"]["best"] >= found["rewards"]["start"]
    assert any("gap between dev and val" in line for line in talk.lines)
    assert any("best - random on val" in line for line in talk.lines)
    assert found["changed"] == (found["prompt"]["instruction"] != "{prompt}")
    facts = read_manifest(given.run_dir / "prompt").facts
    assert facts["instruction"] == found["prompt"]["instruction"] and facts["scores"] == found["scores"]


def test_a_finished_search_is_reused_and_redone_when_asked_or_changed(recipe, counted: list):
    given = recipe()
    build_data(given, console=QUIET)
    first = search_prompt(given, console=QUIET)
    calls = len(counted)
    again = search_prompt(given, console=QUIET)
    assert again["cached"] and len(counted) == calls and again["prompt"] == first["prompt"]
    forced = search_prompt(given, force=True, console=QUIET)
    assert not forced["cached"] and len(counted) == 2 * calls and forced["scores"] == first["scores"]
    assert not search_prompt(recipe(prompt={"budget": 81}), console=QUIET)["cached"]


def test_a_dry_run_checks_and_writes_nothing(recipe, counted: list):
    given = recipe()
    build_data(given, console=QUIET)
    result = search_prompt(given, dry_run=True, console=QUIET)
    assert result["rows"] == {"dev": 8, "pool": 32, "test": 10} and result["calls"] == 160
    assert not (given.run_dir / "prompt").exists() and not counted
    with pytest.raises(RecipeError, match="needs at least"):
        search_prompt(recipe(prompt={"budget": 20}), dry_run=True, console=QUIET)


def test_a_search_that_was_stopped_goes_on_exactly(recipe, monkeypatch: pytest.MonkeyPatch, counted: list):
    import os
    import signal

    whole = recipe("whole")
    build_data(whole, console=QUIET)
    search_prompt(whole, console=QUIET)
    total = sum(map(len, counted))
    counted.clear()
    given = recipe("broken")
    build_data(given, console=QUIET)
    own = Asker.answered

    def stop_later(self, prompt, examples, reward):
        if len(counted) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, prompt, examples, reward)

    with monkeypatch.context() as patch:
        patch.setattr(Asker, "answered", stop_later)
        with pytest.raises(Interrupted) as caught:
            search_prompt(given, console=QUIET)
    assert caught.value.exit_code == 75 and not (given.run_dir / "prompt").exists()
    lost = len(counted[-1])
    talk = Talk(quiet=True)
    search_prompt(given, console=talk)
    assert any("goes on behind" in line for line in talk.lines)
    assert sum(map(len, counted)) == total + lost, "only the call that was cut off is made again"
    assert {**document(given), "instructions": None} == {**document(whole), "instructions": None}
    assert trace(given)[1:] == trace(whole)[1:] and not (given.run_dir / "checkpoints").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_resume_never_starts_anew(recipe, counted: list, resume: str):
    given = recipe()
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    calls = len(counted)
    kept = given.run_dir / "checkpoints" / "prompt"
    kept.mkdir(parents=True)
    for name in ("trace", "random"):
        (kept / f"{name}.jsonl").write_bytes((given.run_dir / "prompt" / f"{name}.jsonl").read_bytes())
    search_prompt(given, force=True, resume=resume, console=QUIET)
    # With the whole trace at hand only the report asks the model.
    assert (len(counted) - calls == calls) if resume == "never" else (len(counted) - calls <= 6 < calls)


def test_one_answer_in_the_dev_rows_is_refused(recipe):
    given = recipe(classes=1)
    build_data(given, console=QUIET)
    with pytest.raises(DataError, match="all 8 dev rows have the answer 'red'"):
        search_prompt(given, console=QUIET)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"instruction": "{prompt} {nothing}"}, RecipeError, "unknown_slot"),
        ({"method": "gepa", "dev": 500, "budget": 9000}, DataError, "training rows beside the dev rows"),
        ({"sources": ["x"]}, RecipeError, "prompt.sources names 'x'"),
        ({"test_split": "test"}, DataError, "no rows in the split 'test'"),
        ({"space": ["verbalizer"], "verbalizers": [{"green": "g"}]}, RecipeError, "label 'green'"),
        ({"space": ["verbalizer"], "verbalizers": [{"red": "g", "blue": "g"}]}, RecipeError, "one word to two labels"),
        ({"on": "tuned"}, DataError, "adapter is not there"),
        ({"proposer": "llm", "llm": {"url": "file:///x", "model": "m"}}, RecipeError, "no http address"),
        (
            {"proposer": "llm", "llm": {"url": "http://h/v1", "model": "m", "key_env": "NO_SUCH"}},
            CapabilityError,
            "NO_SUCH",
        ),
    ],
)
def test_what_cannot_be_searched_is_said_before_a_model_is_loaded(recipe, counted: list, settings, error, said):
    given = recipe(prompt=settings)
    build_data(given, console=QUIET)
    with pytest.raises(error, match=said):
        search_prompt(given, console=QUIET)
    assert not counted


def test_what_the_recipe_alone_tells_is_said_before_any_stage_runs(recipe):
    from mmtune.order import run_stages, stages_of

    given = recipe(prompt={"method": "ape", "budget": 9})
    with pytest.raises(RecipeError, match=r"prompt.budget is 9 model calls, ape needs at least \d+"):
        run_stages(given, stages_of(given, None, True), force=False, dry_run=False, console=QUIET)
    assert not given.run_dir.exists()
    with pytest.raises(ValueError, match="dev rows come from train"):
        Prompt(test_split="train")
    with pytest.raises(ValueError, match=r"eval.split is train, where the dev rows .* set prompt.test_split"):
        Recipe(run_dir="x", prompt={}, eval={"split": "train"})
    assert Recipe(run_dir="x", prompt={"test_split": "val"}, eval={"split": "train"}).eval.split == "train"


def test_a_chat_model_proposes_and_is_not_asked_twice(recipe, monkeypatch: pytest.MonkeyPatch):
    server = Server()
    server.replies = [f"<PROMPT>Number {at}: {{prompt}}</PROMPT>" for at in range(200)]
    llm = {"url": server.url, "model": "writer", "key_env": "MY_KEY"}
    monkeypatch.setenv("MY_KEY", "secret")
    given = recipe(prompt={"proposer": "llm", "llm": llm, "compare_random": False})
    build_data(given, console=QUIET)
    search_prompt(given, offline=True, console=QUIET)
    found, asked = document(given), len(server.asked)
    assert asked > 4 and found["instructions"]["best"].startswith(("Number", "{prompt}"))
    assert "answer: " in server.asked[0]["messages"][0]["content"]
    assert server.heads[0]["Authorization"] == "Bearer secret"
    folder = given.run_dir / "prompt"
    assert not any("secret" in file.read_text() for file in folder.iterdir() if file.is_file())
    # As if it had been killed after its last line.
    kept = given.run_dir / "checkpoints" / "prompt"
    kept.mkdir(parents=True)
    (kept / "trace.jsonl").write_bytes((folder / "trace.jsonl").read_bytes())
    search_prompt(given, force=True, console=QUIET)
    assert len(server.asked) == asked and {**document(given), "calls": 0} == {**found, "calls": 0}
    server.close()


def test_a_far_chat_model_is_not_asked_offline(recipe):
    given = recipe(prompt={"proposer": "llm", "llm": {"url": "http://far.example/v1", "model": "m"}})
    build_data(given, console=QUIET)
    with pytest.raises(CapabilityError, match="--offline"):
        search_prompt(given, offline=True, console=QUIET)


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "said"),
    [(5.0, 1.0, 9.0, 0.0001, "better"), (-5.0, -9.0, -1.0, 0.01, "worse"), (5.0, -1.0, 9.0, 0.01, "a tie")],
)
def test_a_difference_is_clear_only_where_interval_and_test_agree(value, low, high, p, said):
    text = verdict({"value": value, "low": low, "high": high, "p": p})
    assert text.startswith(f"{said} ({value:+.2f}") and ("p < 0.001" in text) == (p < 0.001)
    assert verdict({"value": 5.0, "low": 1.0, "high": 9.0, "p": 0.2}).startswith("a tie")


def test_gap_is_that_of_the_right_option_and_the_best_wrong_one():
    score_L = np.log(np.array([0.1, 0.3, 0.2]))
    share_L = np.array([1, 3, 2]) / 6
    assert gap(score_L, [False, False, True]) == pytest.approx(share_L[2] - share_L[1])
    assert gap(score_L, [False, True, False]) == pytest.approx(share_L[1] - share_L[2])
    assert gap(score_L, [True, True, False]) == pytest.approx(share_L[0] + share_L[1] - share_L[2])
    assert gap(score_L + 700.0, [False, False, False]) == pytest.approx(-0.5)
    assert np.isnan(gap(np.array([np.nan, 0.0]), [True, False]))


@pytest.mark.parametrize(
    ("task", "metric", "used"),
    [("caption", "none", "rouge_l"), ("caption", "cider", "token_f1"), ("sentiment_analysis", "accuracy", "accuracy")],
)
def test_a_reward_is_a_metric_that_has_a_value_of_one_row_alone(task: str, metric: str, used: str):
    turns = (Message("user", (TextPart("Say it."),)), Message("assistant", (TextPart("a red dog"),)))
    rows = [Example(str(at), "s", task, "train", turns, ("a red dog", "one dog"), metric) for at in range(2)]
    assert metric_of(rows[0]) == used
    alone = [row_scores([row], [text])[0] for row, text in zip(rows, ("a red dog", "a cat"), strict=True)]
    assert row_scores(rows, ["a red dog", "a cat"]).tolist() == alone and alone[0] > 99 > alone[1]


def test_rewards_are_those_of_transformers_likelihoods(recipe, tiny_vlm: Path, monkeypatch: pytest.MonkeyPatch):
    given = recipe(prompt={"reward": "gap", "compare_random": False})
    build_data(given, console=QUIET)
    seen: dict[str, dict[str, float]] = {"gap": {}, "likelihood": {}}
    own = Asker.answered

    def answered(self, prompt, examples, reward):
        out = own(self, prompt, examples, reward)
        if not seen["gap"]:
            seen["gap"] = dict(zip((one.id for one in examples), out.rewards, strict=True))
            other = own(self, prompt, examples, "likelihood").rewards
            seen["likelihood"] = dict(zip((one.id for one in examples), other, strict=True))
        return out

    monkeypatch.setattr(Asker, "answered", answered)
    search_prompt(given, console=QUIET)
    table = open_split(given.run_dir / "instructions" / "train").to_pylist()
    rows = {row["id"]: row_to_example(row) for row in table}
    for name in list(seen["gap"])[:2]:
        row = rows[name]
        logs = [likelihood(tiny_vlm, row.messages[0].text, option) for option in row.options]
        scores = np.array([log for log, _ in logs])
        expected = gap(scores, [option in row.references for option in row.options])
        assert seen["gap"][name] == pytest.approx(expected, abs=1e-5)
        log, tokens = logs[row.options.index(row.references[0])]
        assert seen["likelihood"][name] == pytest.approx(np.exp(log / tokens), rel=1e-4)


def test_build_data_and_eval_ask_with_the_same_words(recipe):
    words = [{"red": "r", "yellow": "y", "blue": "b"}]
    settings = {
        "space": ["instruction", "exemplars", "verbalizer"],
        "verbalizers": words,
        "method": "random",
        "instruction": "Say {options}: {prompt}",
    }
    given = recipe(prompt=settings, eval={"compare": ["base", "best_prompt"]})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    path = given.run_dir / "prompt" / "prompt.json"
    # Whatever won: the prompt of the test has all three parts.
    value = json.loads(path.read_text())
    pool = open_split(given.run_dir / "instructions" / "train").to_pylist()[:2]
    value["prompt"].update(exemplars=pool, words=words[0], instruction="Say {options}: {prompt} Now.")
    other = given.run_dir.parent / "mine.json"
    other.write_text(json.dumps(value))
    prompt, _ = read_prompt(other)
    assert isinstance(prompt, SearchedPrompt) and len(prompt.exemplars) == 2
    built = recipe("built", build={"prompt": str(other)})
    build_data(built, console=QUIET)
    for split in ("train", "val"):
        plain = open_split(given.run_dir / "instructions" / split).to_pylist()
        worded = open_split(built.run_dir / "instructions" / split).to_pylist()
        for before, after in zip(plain, worded, strict=True):
            expected = asked_with(prompt, row_to_example(before))
            assert isinstance(expected, Example) and row_to_example(after) == expected
            assert after["messages"][-2]["content"][0]["text"].startswith("Say r, y, b: ")
    changed = read_manifest(built.run_dir / "instructions").inputs
    assert str(other) in changed


def test_a_prompt_of_its_own_rows_is_refused_by_build_data(recipe):
    given = recipe()
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    circle = recipe(build={"prompt": str(given.run_dir / "prompt" / "prompt.json")})
    with pytest.raises(RecipeError, match="searched with the rows that it would word"):
        build_data(circle, console=QUIET)


def test_eval_scores_the_prompt_as_the_search_did(recipe):
    given = recipe(prompt={"test": 12}, eval={"split": "val", "compare": ["base", "best_prompt"]})
    build_data(given, console=QUIET)
    with pytest.raises(DataError, match="prompt is not there"):
        evaluate(given, console=QUIET)
    search_prompt(given, console=QUIET)
    result = evaluate(given, console=QUIET)
    models = result["metrics"]["accuracy"]["models"]
    scores = document(given)["scores"]
    assert models["base"]["value"] == pytest.approx(scores["start"]["test"]["value"], abs=1e-3)
    assert models["best_prompt"]["value"] == pytest.approx(scores["best"]["test"]["value"], abs=1e-3)
    metrics = json.loads((given.run_dir / "report" / "metrics.json").read_text())
    assert any("searched prompt" in note for note in metrics["notes"])
    lines = [json.loads(line) for line in (given.run_dir / "report" / "predictions.jsonl").read_text().splitlines()]
    asked = {model: {row["prompt"] for row in lines if row["model"] == model} for model in ("base", "best_prompt")}
    prompt, _ = read_prompt(given.run_dir / "prompt" / "prompt.json")
    own = [row_to_example(row) for row in open_split(given.run_dir / "instructions" / "val").to_pylist()]
    assert asked["base"] == {question_of(one) for one in own} != asked["best_prompt"]
    assert asked["best_prompt"] == {question_of(asked_with(prompt, one)) for one in own}
    page = (given.run_dir / "report" / "index.html").read_text()
    assert "the searched prompt asks:" in page and "after tuning" not in page
    assert [made["folder"] for made in metrics["manifests"]] == ["instructions", "prompt"]
    assert metrics["perplexity"]["models"].keys() == {"base", "best_prompt"}
    # Wordings of an ensemble change no row that the search read.
    worded = recipe(prompt={"test": 12}, eval={"split": "val", "ensemble": {"wordings": ["sentiment_label"]}})
    build_data(worded, console=QUIET)
    assert search_prompt(worded, console=QUIET)["cached"] and not evaluate(worded, console=QUIET)["cached"]
    # Other rows: some that chose the prompt may be held out now.
    build_data(given, force=True, limit=5, console=QUIET)
    with pytest.raises(IntegrityError, match="searched on other rows"):
        evaluate(given, console=QUIET)


def test_a_prompt_that_shows_pictures_words_rows_of_pictures(recipe, repository):
    """Its media stand with another run; a row of a held-out source is refused."""
    from mmtune.stages.build_data.searched import check_prompt

    given = recipe()
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    notes, scenes = repository / "data" / "scenes" / "annotations", repository / "data" / "scenes"
    source = {
        "id": "compare",
        "reader": "vqa_v2",
        "questions": str(notes / "compare_train_questions.json"),
        "annotations": str(notes / "compare_train_annotations.json"),
        "images": str(scenes / "train"),
        "limit": 4,
    }
    pictures = Recipe.model_validate({"run_dir": given.run_dir.parent / "pictures", "sources": [source]})
    build_data(pictures, console=QUIET)
    (shown,) = open_split(pictures.run_dir / "instructions" / "train").to_pylist()[:1]
    value = json.loads((given.run_dir / "prompt" / "prompt.json").read_text())
    value["prompt"]["exemplars"] = [shown]
    value["media_root"] = read_manifest(pictures.run_dir / "instructions").facts["media_root"]
    path = given.run_dir.parent / "mine.json"
    path.write_text(json.dumps(value))
    worded = pictures.model_copy(update={"build": pictures.build.model_copy(update={"prompt": str(path)})})
    worded = worded.model_copy(update={"run_dir": given.run_dir.parent / "worded"})
    build_data(worded, console=QUIET)
    rows = [row_to_example(row) for row in open_split(worded.run_dir / "instructions" / "train").to_pylist()]
    others = [row for row in rows if row.media[-1].path != shown["images"][0]["path"]]
    assert others and all(len(row.media) == 2 for row in others)
    root = Path(read_manifest(worded.run_dir / "instructions").facts["media_root"])
    assert all((root / medium.path).is_file() for row in rows for medium in row.media)
    prompt, _ = read_prompt(path)
    check_prompt(prompt, {"kept": ("other",)})
    with pytest.raises(RecipeError, match="the mixture holds out"):
        check_prompt(prompt, {"kept": ("compare",)})


def test_base_and_tuned_answer_with_and_without_the_prompt(recipe):
    from mmtune.order import run_stages, stages_of

    tuning = {"max_steps": 2, "batch_rows": 4, "learning_rate": 1e-3, "train": ["llm"], "workers": 0}
    four = ["base", "best_prompt", "tuned", "tuned_best_prompt"]
    given = recipe(eval={"compare": four}).model_copy(update={"finetune": Finetune(**tuning)})
    names = [name for name, *_ in stages_of(given, None, True)]
    assert names == ["build-data", "prompt", "tokenize", "finetune", "eval"]
    results = run_stages(given, stages_of(given, None, True), force=False, dry_run=False, console=QUIET)
    entry = results["eval"]["metrics"]["accuracy"]
    assert list(entry["models"]) == four
    assert [(one["first"], one["second"]) for one in entry["steps"]] == [
        ("base", "tuned"),
        ("best_prompt", "tuned_best_prompt"),
        ("best_prompt", "tuned"),
        ("base", "best_prompt"),
        ("tuned", "tuned_best_prompt"),
    ]
    assert all(one["p"] <= one["p_holm"] <= 1 for one in entry["steps"])
    assert "tuned_best_prompt" in (given.run_dir / "report" / "index.html").read_text()
    assert "tuned_best_prompt" in (given.run_dir / "report" / "report.md").read_text()
    # A search on the tuned model comes behind its tuning.
    later = given.model_copy(update={"prompt": given.prompt.model_copy(update={"on": "tuned"})})
    assert [name for name, *_ in stages_of(later, None, True)] == [*names[:1], *names[2:4], "prompt", "eval"]
    assert search_prompt(later, console=QUIET)["on"] == "tuned"
    assert set(read_manifest(given.run_dir / "prompt").parents) == {"instructions", "adapter"}
    # prompt/ and adapter/ know their base where it moved to.
    shutil.copytree(given.model.path, given.run_dir.parent / "moved")
    moved = later.model_copy(update={"model": Model(path=str(given.run_dir.parent / "moved"))})
    for stage in (search_prompt, evaluate):
        assert stage(moved, dry_run=True, console=QUIET)["dry_run"]
    (given.run_dir.parent / "moved" / "config.json").write_text("{}")
    for stage in (search_prompt, evaluate):
        with pytest.raises(IntegrityError, match="another one than adapter/ was tuned from"):
            stage(moved, dry_run=True, console=QUIET)
    other = later.model_copy(update={"finetune": Finetune(**{**tuning, "max_steps": 1})})
    finetune(other, force=True, console=QUIET)
    with pytest.raises(IntegrityError, match="searched with another adapter") as error:
        evaluate(other, console=QUIET)
    assert error.value.hint == "run: mmtune prompt"


def test_a_dry_run_of_all_stages_says_what_waits(recipe):
    from mmtune.order import run_stages, stages_of

    given = recipe()
    talk = Talk(quiet=True)
    run_stages(given, stages_of(given, None, True), force=False, dry_run=True, console=talk)
    assert "prompt: would run once instructions is there" in talk.lines
    assert "eval: would run once instructions and prompt are there" in talk.lines
    assert not (given.run_dir / "instructions").exists()


def test_show_draws_a_search(recipe):
    given = recipe()
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    found = describe(given.run_dir / "prompt")
    assert list(found["searches"]) == ["ape", "random"]
    course = found["searches"]["ape"]
    assert course["calls"] == document(given)["calls"]["search"]
    assert course["rises"][-1]["best"] == course["prompts"][0]["score"] == document(given)["rewards"]["best"]
    text = render(found)
    assert "█|" in text and "rows      dev 8, val 10" in text
    assert repr(document(given)["prompt"]["instruction"])[:40] in text
    assert "prompt" in describe(given.run_dir)["stages"]


def test_rows_that_a_prompt_makes_too_long_count_as_wrong(recipe):
    given = recipe(prompt={"test": 12}, eval={"loss": True})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    path = given.run_dir / "prompt" / "prompt.json"
    value = json.loads(path.read_text())
    value["prompt"]["instruction"] = "{prompt} " + "never " * 2000
    made = read_manifest(path.parent)
    path.write_text(json.dumps(value))
    files = {**made.files, "prompt.json": {"size": path.stat().st_size, "sha256": file_digest(path)}}
    write_manifest(path.parent, replace(made, files=files))
    result = evaluate(given, console=QUIET)
    assert result["metrics"]["accuracy"]["models"]["best_prompt"]["value"] == 0
    assert result["perplexity"]["models"].keys() == {"base"}


def test_the_command_prints_one_document(recipe, tmp_path: Path):
    from mmtune.cli import app

    given = recipe()
    build_data(given, console=QUIET)
    path = tmp_path / "recipe.json"
    path.write_text(given.model_dump_json(exclude_defaults=True))
    done = CliRunner().invoke(
        app,
        ["prompt", str(path), "--json", "--quiet", "--limit", "6", "--seed", "4", "--method", "opro", "--budget", "70"],
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["schema"], found["seed"], found["method"]) == ("mmtune.prompt/1", 4, "opro")
    assert found["calls"]["budget"] == 70 and found["scores"]["best"]["dev"]["n"] == 6
    assert is_finished(given.run_dir / "prompt")

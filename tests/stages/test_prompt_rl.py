"""prompt with methods rl and bbt on a real model: rewards, calls, its pieces, soft tokens that come back."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.tuned_from import base_at
from mmtune.prompts.search.reward import piecewise
from mmtune.recipe import Eval, Recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.stages.evaluate.prompted import prompt_of
from mmtune.stages.prompt import prompt as search_prompt
from mmtune.stages.prompt.asking import Asker
from mmtune.stages.prompt.words import _pieces
from mmtune.stages.show import describe, render
from mmtune.storage import read_manifest
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
ANSWERS = ("red", "yellow", "blue")
WORDS = ["look", "say", "what", "is", "the", "color", "red"]
BBT = {"method": "bbt", "bbt": {"soft_tokens": 3, "dimension": 5}}


@pytest.fixture
def recipe(tmp_path: Path, tiny_vlm: Path):
    def make(name: str = "run", **settings) -> Recipe:
        for split, count in (("train", 24), ("val", 12)):
            lines = [{"q": f"{split} {at} is", "a": ANSWERS[at % 3]} for at in range(count)]
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
        prompt = {
            "method": "rl",
            "reward": "piecewise",
            "budget": 90,
            "dev": 8,
            "test": 10,
            "minibatch": 4,
            "population": 4,
            "rl": {"words": WORDS, "length": 2},
        }
        own = settings.get("prompt", {})
        if "rl" not in own and own.get("method", "rl") != "rl":
            del prompt["rl"]
        return Recipe(
            run_dir=tmp_path / name,
            model={"path": str(tiny_vlm)},
            sources=sources,
            build={"workers": 1, **settings.get("build", {})},
            prompt={**prompt, **own},
            eval={"compare": ["base", "best_prompt"], "answer": "rank", "bootstrap": 100, **settings.get("eval", {})},
        )

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of the model."""
    calls: list[int] = []
    own = Asker.answered

    def answered(self, prompt, examples, reward):
        calls.append(len(examples))
        return own(self, prompt, examples, reward)

    monkeypatch.setattr(Asker, "answered", answered)
    return calls


def document(recipe: Recipe) -> dict:
    return json.loads((recipe.run_dir / "prompt" / "prompt.json").read_text())


def trace(recipe: Recipe, name: str = "trace") -> list[dict]:
    return [json.loads(line) for line in (recipe.run_dir / "prompt" / f"{name}.jsonl").read_text().splitlines()]


def test_rl_tries_the_words_before_the_start_and_random_search_draws_the_same_words(recipe, counted):
    given = recipe()
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    found = document(given)
    assert sum(counted) == sum(found["calls"][name] for name in ("search", "random", "report"))
    assert 60 < found["calls"]["search"] <= 90 and found["calls"]["random"] <= found["calls"]["search"]
    for name in ("trace", "random"):
        tried = [line["candidate"]["instruction"] for line in trace(given, name)[1:]]
        assert tried[0] == "{prompt}" and len(set(tried)) > 3
        for text in set(tried[1:]):
            first, second, rest = text.split(" ", 2)
            # An answer of the rows is no word of a prompt.
            assert {first, second} <= set(WORDS) - {"red"} and rest == "{prompt}"


def test_piecewise_rewards_are_those_of_the_gap(recipe):
    lines = {}
    for reward in ("gap", "piecewise"):
        given = recipe(reward, prompt={"reward": reward})
        build_data(given, console=QUIET)
        search_prompt(given, console=QUIET)
        lines[reward] = trace(given)[1]["rewards"]
    gap_N = np.array(lines["gap"])
    assert (gap_N > 0).any() and (gap_N <= 0).any()
    assert lines["piecewise"] == pytest.approx(piecewise(gap_N).tolist(), rel=1e-6)


def test_words_take_the_place_of_a_start_without_slots_and_pieces_are_those_of_the_tokenizer(recipe, tiny_vlm):
    from transformers import AutoTokenizer

    given = recipe(prompt={"instruction": "Say it.", "rl": {"length": 3, "hidden": 4, "top_k": 5}})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(tiny_vlm)
    pieces = _pieces(tokenizer)
    assert all(any(letter.isalpha() for letter in piece) and len(ids) == 1 for piece, ids in pieces.items())
    tried = {line["candidate"]["instruction"] for line in trace(given)[1:]} - {"Say it."}
    assert len(tried) > 3 and not any("{prompt}" in text or "Say it." in text for text in tried)


def test_soft_tokens_are_found_counted_and_saved_as_an_adapter(recipe, counted):
    given = recipe(prompt={**BBT, "budget": 150})
    build_data(given, console=QUIET)
    result = search_prompt(given, console=QUIET)
    found = document(given)
    assert sum(counted) == sum(found["calls"][name] for name in ("search", "random", "report"))
    assert [len(line["candidate"]["z"]) for line in trace(given)[2:]] == [5] * (len(trace(given)) - 2)
    assert "z" not in json.dumps(result["prompt"]) and "soft" in render(describe(given.run_dir / "prompt"))
    assert found["soft"] == "soft" and found["rewards"]["best"] > found["rewards"]["start"]
    config = json.loads((given.run_dir / "prompt" / "soft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 3)
    # eval loads the adapter, and scores what the search scored.
    report = evaluate(given, console=QUIET)
    scores = {name: one["value"] for name, one in report["metrics"]["accuracy"]["models"].items()}
    assert report["rows"] == 12 and set(scores) == {"base", "best_prompt"}


def test_eval_scores_soft_tokens_as_the_search_did(recipe):
    given = recipe(prompt={**BBT, "budget": 150, "test": 12})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    report = evaluate(given, console=QUIET)
    scores = document(given)["scores"]
    for ours, theirs in (("base", "start"), ("best_prompt", "best")):
        value = report["metrics"]["accuracy"]["models"][ours]["value"]
        assert value == pytest.approx(scores[theirs]["test"]["value"])


def test_soft_tokens_are_refused_where_there_is_no_place_for_them(recipe):
    given = recipe(prompt={**BBT, "budget": 150})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    with pytest.raises(RecipeError, match="soft tokens"):
        prompt_of(
            given,
            Eval(compare=["base", "tuned_best_prompt"]),
            read_manifest(given.run_dir / "instructions"),
            base_at(given.model.path, None),
            None,
        )
    other = recipe("other", build={"prompt": str(given.run_dir / "prompt" / "prompt.json")})
    with pytest.raises(RecipeError, match="soft tokens are no words"):
        build_data(other, console=QUIET)


@pytest.mark.parametrize("own", [{}, {**BBT, "budget": 150}], ids=["rl", "bbt"])
def test_a_search_that_was_stopped_goes_on_exactly(recipe, own, monkeypatch, counted):
    whole = recipe("whole", prompt=own)
    build_data(whole, console=QUIET)
    search_prompt(whole, console=QUIET)
    broken = recipe("broken", prompt=own)
    build_data(broken, console=QUIET)
    counted.clear()
    answered = Asker.answered

    def dying(self, prompt, examples, reward):
        if len(counted) == 5:
            raise KeyboardInterrupt
        return answered(self, prompt, examples, reward)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Asker, "answered", dying)
        search_prompt(broken, console=QUIET)
    counted.clear()
    search_prompt(broken, console=QUIET)
    assert [line["key"] for line in trace(broken)[1:]] == [line["key"] for line in trace(whole)[1:]]
    assert document(broken)["prompt"] == document(whole)["prompt"]
    calls = document(whole)["calls"]
    assert 0 < sum(counted) < sum(calls[name] for name in ("search", "random", "report"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 20}, "needs at least"),
        ({"rl": {"words": ["red", "say"]}}, "leaves 1 words"),
    ],
)
def test_what_cannot_be_searched_is_refused(recipe, settings, said):
    given = recipe(prompt=settings)
    build_data(given, console=QUIET)
    with pytest.raises(RecipeError, match=said) as caught:
        search_prompt(given, console=QUIET)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rl": {"policy": "lm"}}, "go together"),
        ({"space": ["instruction", "exemplars"]}, "leave out space"),
        ({"method": "bbt", "on": "tuned"}, "leave out `on`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(recipe, settings, said):
    with pytest.raises(ValueError, match=said):
        recipe(prompt=settings)


def test_a_writer_without_trl_is_refused_before_a_model_is_loaded(recipe, tiny_vlm, monkeypatch, counted):
    import sys

    monkeypatch.setitem(sys.modules, "trl", None)
    given = recipe(prompt={"rl": {"policy": "lm", "writer": {"model": str(tiny_vlm)}}})
    build_data(given, console=QUIET)
    with pytest.raises(CapabilityError, match="needs trl") as caught:
        search_prompt(given, console=QUIET)
    assert caught.value.exit_code == 4 and "preference" in caught.value.hint and not counted


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch, tiny_vlm: Path):
    """Says that the model of a search is the same to the byte as when it was loaded, and so are its files."""
    from mmtune.models.towers import fingerprints
    from mmtune.stages.prompt import course

    loaded, load = [], course._model

    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tiny_vlm.iterdir() if file.is_file()}

    def loading(of: course.Course):
        model = load(of)
        loaded.append((model, fingerprints(model)))
        return model

    monkeypatch.setattr(course, "_model", loading)
    before = files()
    yield
    ((model, weights),) = loaded
    after = fingerprints(model)
    assert len(weights) > 10 and weights == {name: after[name] for name in weights}
    assert before == files()


@pytest.mark.parametrize("method", ["ape", "opro", "mipro", "gepa", "random", "rl", "bbt"])
def test_a_search_leaves_the_weights_as_they_are(recipe, frozen, method):
    own = {**BBT, "budget": 150} if method == "bbt" else {"method": method}
    given = recipe(prompt={**own, "compare_random": False})
    build_data(given, console=QUIET)
    assert search_prompt(given, console=QUIET)["calls"]["search"] > 20


@pytest.mark.slow
def test_a_language_model_writes_the_prompts(recipe, tmp_path, tiny_vlm, frozen, monkeypatch):
    import peft
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_vlm)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**small, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    # What is left is the tokenizer of a model that takes text alone.
    kept = json.loads((tmp_path / "writer" / "tokenizer_config.json").read_text())
    kept.pop("processor_class")
    (tmp_path / "writer" / "tokenizer_config.json").write_text(json.dumps(kept))
    ranks, requests, lora, read = [], [], peft.LoraConfig, tokenizer.__class__.apply_chat_template
    monkeypatch.setattr(peft, "LoraConfig", lambda **own: ranks.append(own["r"]) or lora(**own))
    monkeypatch.setattr(
        tokenizer.__class__,
        "apply_chat_template",
        lambda self, *given, **own: requests.append(str((given, own))) or read(self, *given, **own),
    )
    own = {"max_tokens": 5, "learning_rate": 1e-3, "lora_r": 2, "request": "Say one thing."}
    writer = {"model": str(tmp_path / "writer"), **own}
    given = recipe(prompt={"rl": {"policy": "lm", "writer": writer}})
    build_data(given, console=QUIET)
    search_prompt(given, console=QUIET)
    assert ranks == [2] and any("Say one thing." in said for said in requests)
    tried = [line["candidate"]["instruction"] for line in trace(given)[1:]]
    assert len(set(tried)) > 3 and all(text.endswith("{prompt}") for text in tried)
    assert document(given)["calls"]["search"] <= 90


def test_a_prompt_names_no_answer_however_it_is_spelled():
    from mmtune.stages.prompt.words import names_one

    answers = {"yes", "red", "new york", "3"}
    assert names_one("say Yes now", answers) and names_one("in New York.", answers) and names_one("3", answers)
    assert not names_one("yesterday bored 33 york", answers)

"""eval.answer soft: options by learned vectors, against transformers' own states and logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtune.encoding.processor import load_processor
from mmtune.encoding.render import Renderer
from mmtune.errors import DataError, IntegrityError
from mmtune.evaluation import asking, soft_verbalizer
from mmtune.evaluation.soft_options import WordTokens
from mmtune.evaluation.soft_verbalizer import Labelled, start_of
from mmtune.records import Example, Message, TextPart
from mmtune.stages.evaluate import evaluate
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from tests.stages.test_prototypes import asked, prompts_of, state_of, table

OPTIONS = ("red", "yellow")


def sources(folder: Path, answers: tuple[str, ...] = OPTIONS, options: tuple[str, ...] = OPTIONS, **more) -> list[dict]:
    made = [table(folder, "train", 12, answers), table(folder, "val", 6, answers)]
    for source in made:
        source["columns"]["options"] = "=" + "|".join(options)
        source.update(more)
    return made


def answers_of(recipe) -> dict[str, str]:
    lines = (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()
    return {line["prompt"]: line["prediction"] for line in map(json.loads, lines)}


def head_and_tokens(folder: Path, words: tuple[str, ...] = OPTIONS) -> tuple[torch.Tensor, list[list[list[int]]]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = [[tokenizer(word, add_special_tokens=False)["input_ids"]] for word in words]
    return model.get_output_embeddings().weight.detach(), ids


def test_the_answer_is_the_option_whose_learned_vector_fits_best(tmp_path: Path, tiny_vlm: Path):
    recipe, talk = asked(tmp_path, tiny_vlm, sources(tmp_path), answer="soft"), Talk(quiet=True)
    report = evaluate(recipe, console=talk)
    assert report["rows"] == 6 and "eval: vectors of t: red 6, yellow 6" in talk.lines
    head, ids = head_and_tokens(tiny_vlm)
    known = [(state_of(tiny_vlm, prompt), OPTIONS.index(answer)) for prompt, answer in prompts_of(recipe, "train")]
    # Rows stand in the order of their ids' hashes, which says which of them are held out together.
    states, owners = np.array([state for state, _ in known], np.float64), np.array([owner for _, owner in known])
    rows = Labelled(states, owners, np.ones((12, 2), bool))
    start = start_of(head, None, ids)
    document = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    (said,) = (note for note in document["notes"] if "soft verbalizer of t, from 12 training rows" in note)
    strength = float(said.partition("strength ")[2].partition(" ")[0]) if "strength" in said else 0.0
    wanted = soft_verbalizer.fitted(start, rows, strength)
    found = answers_of(recipe)
    assert len(found) == 6
    for prompt, _ in prompts_of(recipe, "val"):
        assert found[prompt] == OPTIONS[int(wanted.scores(state_of(tiny_vlm, prompt)[None]).argmax())]


def test_untrained_it_answers_as_the_words_themselves_do(tmp_path: Path, tiny_vlm: Path, monkeypatch):
    words = {"red": ("hot", "far"), "yellow": ("sea",)}
    monkeypatch.setattr(soft_verbalizer, "STRENGTHS", (0.0,))
    recipe = asked(tmp_path, tiny_vlm, sources(tmp_path, verbalizer=words), answer="soft")
    evaluate(recipe, console=Talk(quiet=True))
    head, ids = head_and_tokens(tiny_vlm, ("hot", "far", "sea"))
    one, two, other = (np.mean([head[at].numpy() for at in own[0]], axis=0) for own in ids)
    found = answers_of(recipe)
    for prompt, _ in prompts_of(recipe, "val"):
        state = state_of(tiny_vlm, prompt)
        assert found[prompt] == ("hot" if (one + two) @ state / 2 > other @ state else "sea")


def test_what_cannot_be_learned_is_refused(tmp_path: Path, tiny_vlm: Path):
    recipe = asked(tmp_path, tiny_vlm, sources(tmp_path, options=(*OPTIONS, "blue")), answer="soft")
    with pytest.raises(DataError, match="no training row of 't' answers with 'blue'") as error:
        evaluate(recipe, console=Talk(quiet=True))
    assert error.value.code == "no_prototypes" and not (recipe.run_dir / "report").exists()
    one = asked(tmp_path / "one", tiny_vlm, sources(tmp_path, ("red",), ("red",)), answer="soft")
    with pytest.raises(DataError, match="has one option alone, 'red'") as error:
        evaluate(one, console=Talk(quiet=True))
    assert error.value.code == "one_label"


def test_a_label_of_one_row_is_named_where_the_others_are_judged(tmp_path: Path, tiny_vlm: Path):
    answers = ("red", "yellow", "red", "yellow", "red", "yellow", "red", "yellow", "red", "yellow", "red", "blue")
    recipe = asked(tmp_path, tiny_vlm, sources(tmp_path, answers, (*OPTIONS, "blue")), answer="soft")
    evaluate(recipe, console=Talk(quiet=True))
    document = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    (said,) = (note for note in document["notes"] if "soft verbalizer of t, from 12 training rows" in note)
    assert "on rows held out" in said and said.count("of blue no row was held out, as there is one alone") == 1


def test_a_word_is_its_own_tokens_without_what_ends_the_answer(tiny_vlm: Path):
    processor = load_processor(str(tiny_vlm))
    row = Example(
        "t/1", "t", "label", "val", (Message("user", (TextPart("Which?"),)),), ("red",), "accuracy", ("red", "sea")
    )
    control = frozenset(processor.tokenizer.added_tokens_decoder)
    words = WordTokens({"t": {"red": ("red", "yellow lemon")}}, Renderer(processor).encode, control)
    _, ids = head_and_tokens(tiny_vlm, ("red", "yellow lemon", "sea"))
    assert words.of(row) == {"red": [ids[0][0], ids[1][0]], "sea": [ids[2][0]]}


def test_states_that_overflow_are_no_place_to_measure_from(tmp_path: Path, tiny_vlm: Path, monkeypatch):
    states = np.zeros((12, 4), np.float32)
    states[3, 1] = np.inf
    monkeypatch.setattr(asking, "prompt_states", lambda *given, **more: states)
    with pytest.raises(IntegrityError, match="base gives states that are no numbers for 1 of 12 rows"):
        evaluate(asked(tmp_path, tiny_vlm, sources(tmp_path), answer="soft"), console=Talk(quiet=True))


def test_a_model_of_damaged_weights_answers_nothing(tmp_path: Path, tiny_vlm: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_vlm, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = asked(tmp_path, folder, sources(tmp_path), answer="soft")
    with pytest.raises(IntegrityError, match="base gives states that are no numbers for 12 of 12 rows"):
        evaluate(recipe, console=Talk(quiet=True))
    assert read_manifest(recipe.run_dir / "instructions").rows["train"] == 12

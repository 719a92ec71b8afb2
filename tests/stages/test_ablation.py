"""eval.ablate on the bundled bases: what goes, hurts where it should; the report says so in all its forms."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmtune.errors import IntegrityError, RecipeError
from mmtune.recipe.text import load_recipe
from mmtune.stages.build_data import build_data
from mmtune.stages.evaluate import evaluate
from mmtune.talk import Talk

QUIET = Talk(quiet=True)


def run(
    folder: Path, model: Path, source: list[str], *settings: str, talk: Talk = QUIET
) -> tuple[dict[str, Any], Path]:
    """Builds the rows of a source and lets a base model answer them."""
    lines = ["run_dir: run", "seed: 1", f"model: {{path: {model}}}", "sources:", *source, "build: {workers: 1}"]
    file = folder / "recipe.yaml"
    file.write_text("\n".join([*lines, "tokenize: {max_length: 512}"]) + "\n")
    evaluation = ["eval.split=test", "eval.compare=[base]", "eval.bootstrap=200", "eval.max_new_tokens=6", *settings]
    recipe = load_recipe(file, evaluation)
    build_data(recipe, console=QUIET)
    return evaluate(recipe, console=talk), folder / "run" / "report"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The bundled omni base under hybrid fusion: its weights in every pass, and a fresh gate."""
    from mmtune.encoding.processor import load_processor
    from mmtune.models.composite.config import CompositeConfig
    from mmtune.models.composite.model import CompositeForConditionalGeneration
    from mmtune.models.load import load_model

    folder, omni = tmp_path_factory.mktemp("hybrid"), load_model(str(repository / "data" / "omni"))
    config = CompositeConfig(**{**omni.config.to_dict(), "fusion": {"mode": "hybrid"}})
    made = CompositeForConditionalGeneration(config)
    assert made.load_state_dict(omni.state_dict(), strict=False).missing_keys == ["model.gate.bias"]
    made.save_pretrained(folder)
    load_processor(str(repository / "data" / "omni")).save_pretrained(folder)
    return folder


def sounds(repository: Path, folder: Path) -> list[str]:
    """Ten words, ten digits, and six pictures that may show the digit that is said."""
    data, kept = repository / "data", Counter[str]()
    rows = []
    with gzip.open(data / "sounds" / "annotations" / "test.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            kind = json.loads(line)["question_type"]
            kept[kind] += 1
            rows += [line] * (kept[kind] <= {"word": 10, "digit": 10, "match": 6}.get(kind, 0))
    (folder / "sounds.jsonl").write_text("".join(rows), "utf-8")
    return [
        f"  - {{id: sounds, reader: table, split: test, path: {folder}/sounds.jsonl,",
        "     columns: {id: id, question: question, answer: answer, audio: audio, images: image},",
        f"     audios: {data}/sounds/test, images: {data}/scenes/test, template: vqa_plain}}",
    ]


def scores(entry: dict[str, Any]) -> list[float]:
    (metric,) = entry["metrics"].values()
    return [found["value"] for found in metric["models"].values()]


def test_a_hybrid_model_tells_its_passes_apart(hybrid: Path, repository: Path, tmp_path: Path) -> None:
    talk = Talk(quiet=True)
    result, report = run(
        tmp_path, hybrid, sounds(repository, tmp_path), "eval.ablate=[modality, fusion, shots, instructions]", talk=talk
    )
    # Rows share their beginnings under every ablation, and what cannot be taken away is said.
    (note,) = [line for line in talk.lines if "one by one" in line or "eval.ablate" in line]
    assert note == "eval.ablate: shots takes nothing away: no row shows exemplars"
    fusion = result["fusion"]["base"]
    branches = fusion["branches"]
    assert list(branches) == ["joint", "image", "audio"] and branches["joint"]["n"] == 26
    assert (branches["image"]["n"], branches["audio"]["n"]) == (6, 26)
    # The fresh gate: 0.9, 0.05 and 0.05; without a picture its part goes to the others.
    assert 0.9 <= branches["joint"]["weight"]["value"] <= 0.9 / 0.95 + 1e-4
    assert branches["image"]["weight"]["value"] == pytest.approx(0.05, abs=1e-4)
    assert 0 < fusion["gate_entropy"] < 0.4
    entries = {entry["name"]: entry for entry in result["ablation"]["entries"]}
    assert list(entries) == [
        "without image",
        "without audio",
        "without any medium",
        "joint pass alone",
        "image pass alone",
        "audio pass alone",
        "questions shuffled",
        "the commonest answer, always",
    ]
    assert result["ablation"]["nothing"] == ["shots"]
    full, deaf = scores(entries["without audio"])
    shuffled = scores(entries["questions shuffled"])[1]
    assert full > 80 and deaf < 40 and shuffled < full - 20
    assert entries["without audio"]["metrics"]["exact_match"]["difference"]["high"] < 0
    # The joint pass bears 0.9 of the weight; the sound's pass reads nearly all that is asked about.
    assert abs(scores(entries["joint pass alone"])[1] - full) < 10
    assert (
        branches["joint"]["perplexity"]["value"]
        < entries["without audio"]["perplexity"]["models"]["without audio"]["value"]
    )
    written = json.loads((report / "metrics.json").read_text())
    assert written["ablation"] == result["ablation"] and written["fusion"] == result["fusion"]
    for name in ("report.md", "index.html"):
        text = (report / name).read_text()
        assert "What the answers rest on" in text and "without audio" in text and "Passes of the fusion" in text
        assert "had nothing to take away: shots (no row shows exemplars)" in text


@pytest.fixture(scope="module")
def omni_with_heads(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The bundled omni base beside random heads of the adversarial objective."""
    from mmtune.models.load import load_model
    from mmtune.training.heads import save_heads
    from mmtune.training.learner import CodeSettings, Learner, LearnerSettings
    from mmtune.training.pair_losses import TextMasking

    base = tmp_path_factory.mktemp("heads") / "base"
    shutil.copytree(repository / "data" / "omni", base)
    settings = LearnerSettings(
        {"adversarial": 1.0}, CodeSettings(("image", "audio", "text"), 8), TextMasking(3, 100, (0, 1)), 0, {}
    )
    save_heads(Learner(load_model(str(base)), settings), base)
    return base


def test_a_base_with_generators_says_how_well_it_fills_in_what_is_missing(
    omni_with_heads: Path, repository: Path, tmp_path: Path
) -> None:
    """The heads are random: codes are hardly nearer to their own than by chance; no other base says anything."""
    source = sounds(repository, tmp_path)
    result, report = run(tmp_path, omni_with_heads, source, "eval.ablate=[modality]", "eval.loss=false")
    found = {(own["missing"], own["source"]): own for own in result["filling"]}
    assert list(found) == [("audio", "image"), ("image", "audio"), ("image", "text"), ("audio", "text")]
    both, heard = found["image", "audio"], found["audio", "text"]
    assert (both["rows"], both["pool"], heard["rows"], heard["pool"]) == (6, 6, 26, 10)
    assert all(own["error"] > 0.5 and own["recall"] <= 0.5 for own in found.values())
    assert json.loads((report / "metrics.json").read_text())["filling"] == result["filling"]
    for name in ("report.md", "index.html"):
        assert "Missing parts filled in" in (report / name).read_text()
    plain, _ = run(tmp_path, omni_with_heads, source, "eval.loss=false")
    other, _ = run(tmp_path, repository / "data" / "omni", source, "eval.ablate=[modality]", "eval.loss=false")
    assert plain["filling"] is None and other["filling"] is None


@pytest.mark.parametrize("changed", ["setting", "weight"])
def test_heads_of_another_version_end_eval_before_anything_is_asked(
    changed: str, omni_with_heads: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    from mmtune.stages.evaluate import answers

    base = tmp_path / "base"
    shutil.copytree(omni_with_heads, base)
    if changed == "setting":
        (file,) = (base / "heads").glob("*.json")
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "codes": {**kept["codes"], "older": 1}}))
    else:
        (file,) = (base / "heads").glob("*.safetensors")
        weights = load_file(file)
        save_file({f"older.{name}": value for name, value in weights.items()}, file)
    monkeypatch.setattr(answers, "ask_each", lambda *args: pytest.fail("asked"))
    with pytest.raises(IntegrityError, match="not those that this version makes") as error:
        run(tmp_path, base, sounds(repository, tmp_path), "eval.ablate=[modality]", "eval.limit=4")
    assert error.value.exit_code == 7 and error.value.hint == "run: mmtune pretrain --force"


def test_a_blind_llava_is_worse(repository: Path, tmp_path: Path) -> None:
    scenes = repository / "data" / "scenes"
    source = [
        f"  - {{id: scenes, reader: vqa_v2, split: test, images: {scenes}/test, template: vqa_plain, limit: 40,",
        f"     questions: {scenes}/annotations/base_test_questions.json.gz,",
        f"     annotations: {scenes}/annotations/base_test_annotations.json.gz}}",
    ]
    talk = Talk(quiet=True)
    settings = "eval.ablate=[modality, fusion]", "eval.loss=false"
    result, _ = run(tmp_path, repository / "data" / "base", source, *settings, talk=talk)
    assert any(
        line.startswith("eval.ablate: fusion takes nothing away: the model has no passes") for line in talk.lines
    )
    with pytest.raises(RecipeError, match="takes nothing away: shots: no row shows exemplars; fusion: "):
        run(tmp_path, repository / "data" / "base", source, "eval.ablate=[shots, fusion]", "eval.loss=false")
    assert result["fusion"] is None and result["ablation"]["nothing"] == ["fusion"]
    blind, guess = result["ablation"]["entries"]
    assert blind["name"] == "without image" and blind["n"] == 40 and "perplexity" not in blind
    full, without = scores(blind)
    assert full > 70 and without < full - 20 and scores(guess)[1] < full


def test_nothing_is_taken_away_unasked(repository: Path, tmp_path: Path) -> None:
    source = sounds(repository, tmp_path)
    result, report = run(tmp_path, repository / "data" / "omni", source, "eval.limit=4", "eval.loss=false")
    assert result["fusion"] is None and result["ablation"] is None
    assert "rest on" not in (report / "report.md").read_text()

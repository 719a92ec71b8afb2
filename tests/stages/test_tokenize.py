"""The tokenize stage: nothing lost, the same output for any number of processes, checks on real files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtune.errors import DataError
from mmtune.recipe import Model, Recipe, Tokenize
from mmtune.records import Example, Medium, Message, TextPart
from mmtune.stages import tokenize as stage
from mmtune.storage import SplitWriter, finish_split, open_split, open_stage, read_manifest
from mmtune.talk import Talk

SIZES = [(64, 48), (30, 90), (100, 20), (56, 56)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A model folder with a tiny Qwen2-VL processor, saved as transformers saves it."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    from bench_tokenize import write_model

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def example(number: int, root: Path, *, answer: str = "yes", question: str = "Is it red?") -> Example:
    picture = number // 3
    width, height = SIZES[picture % len(SIZES)]
    path = f"{picture}.png"
    if not (root / path).exists():
        noise = np.random.default_rng(picture).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / path)
    medium = Medium("image", path, width=width, height=height, frames=1)
    messages = (
        Message("user", (medium, TextPart(f"{question} {number}"))),
        Message("assistant", (TextPart(answer),) if answer else ()),
    )
    return Example(f"vqa/{number}", "vqa", "vqa", "train", messages, (answer,), "exact_match", group=path)


def prepare(folder: Path, examples: list[Example]) -> None:
    from mmtune.prompts.schema import example_to_row, instructions_schema

    staging = open_stage(folder / "instructions", stage="build-data", config={"rows": len(examples)})
    assert staging is not None
    with staging:
        writer = SplitWriter(staging.path / "train" / "shard-00000.arrow", instructions_schema(), rows_per_batch=7)
        for item in examples:
            writer.write(example_to_row(item))
        count = writer.close()
        finish_split(staging.path / "train", instructions_schema())
        staging.publish(rows={"train": count}, facts={"media_root": str(folder / "media")})


def run(folder: Path, model: Path, **settings: Any) -> dict[str, Any]:
    recipe = Recipe(run_dir=folder, model=Model(path=str(model)), tokenize=Tokenize(**settings))
    return stage.tokenize(recipe, offline=True, console=Talk(quiet=True))


def examples_in(root: Path) -> list[Example]:
    root.mkdir(parents=True, exist_ok=True)
    rows = [example(number, root) for number in range(40)]
    # A group that comes back later still makes one tree.
    rows.append(rows.pop(1))
    rows[5] = example(6, root, answer="")
    rows[9] = example(10, root, question="why " * 400)
    return rows


def test_rows_out_and_refused_add_up(tmp_path: Path, model: Path, capsys: Any) -> None:
    prepare(tmp_path, examples_in(tmp_path / "media"))
    result = run(tmp_path, model, workers=1, max_length=400)
    told = "note: tokenize refused 2 of 40 rows: no_target 1, too_long 1; a tokenize.max_length above 400 may help"
    assert told in capsys.readouterr().err
    assert result["rows"]["train"] == 38 and result["drops"] == {"no_target": 1, "too_long": 1}
    rejects = [json.loads(line) for line in (tmp_path / "tokens" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["id"]: reject["reason"] for reject in rejects} == {"vqa/6": "no_target", "vqa/10": "too_long"}
    table = open_split(tmp_path / "tokens" / "train")
    names = [name for row in table.column("example_ids").to_pylist() for name in row]
    assert sorted(names) == sorted({f"vqa/{n}" for n in range(40)} - {"vqa/6", "vqa/10"})
    assert table.column("example_ids").to_pylist()[0] == ["vqa/0", "vqa/2", "vqa/1"]
    facts = read_manifest(tmp_path / "tokens").facts
    assert facts["model"] == str(model) and facts["notes"] == []
    assert facts["tokens"] < facts["tokens_apart"]
    import datasets

    assert len(datasets.load_from_disk(str(tmp_path / "tokens"))["train"]) == table.num_rows
    assert run(tmp_path, model, workers=2, max_length=400)["cached"]


def test_the_next_step_fits_the_reasons(tmp_path: Path, model: Path) -> None:
    sound = Medium("audio", "a.wav", frames=800, sample_rate_hz=8000, seconds=0.1)
    messages = (Message("user", (sound, TextPart("Which?"))), Message("assistant", (TextPart("one"),)))
    prepare(tmp_path, [Example("s/1", "s", "vqa", "train", messages, ("one",), "exact_match", group="a.wav")])
    with pytest.raises(DataError, match="modality_unsupported 1") as error:
        run(tmp_path, model, workers=1)
    assert error.value.hint == f"{model} reads no such media: name a `model` that does, or leave these sources out"
    (tmp_path / "media").mkdir()
    prepare(tmp_path / "long", [example(1, tmp_path / "media", question="why " * 400)])
    with pytest.raises(DataError, match="too_long 1") as error:
        run(tmp_path / "long", model, workers=1, max_length=400)
    assert error.value.hint == "a tokenize.max_length above 400 may help, or tokenize.too_long"


def test_output_does_not_depend_on_the_number_of_processes(tmp_path: Path, model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stage, "_UNIT", 3)
    monkeypatch.setattr(stage, "_INLINE_UNITS", 0)
    prepare(tmp_path, examples_in(tmp_path / "media"))
    found = []
    for workers in (1, 2):
        run(tmp_path, model, workers=workers, max_length=400, video_frames=workers)
        manifest = read_manifest(tmp_path / "tokens")
        found.append((manifest.files["train/data-00000-of-00001.arrow"]["sha256"], manifest.rows, manifest.drops))
    assert found[0] == found[1]


def test_rows_layout_keeps_the_order(tmp_path: Path, model: Path) -> None:
    rows = [example(number, tmp_path / "media") for number in range(7)] if (tmp_path / "media").mkdir() is None else []
    prepare(tmp_path, rows)
    run(tmp_path, model, workers=1, layout="rows")
    names = open_split(tmp_path / "tokens" / "train").column("example_ids").to_pylist()
    assert names == [[f"vqa/{number}"] for number in range(7)]


def test_a_batch_of_the_real_files_fits_the_recorded_spans(tmp_path: Path, model: Path) -> None:
    from mmtune.encoding.collate import Collator
    from mmtune.encoding.processor import load_processor
    from mmtune.encoding.tree import row_to_tree, tree_rows

    (tmp_path / "media").mkdir()
    prepare(tmp_path, [example(number, tmp_path / "media") for number in range(12)])
    run(tmp_path, model, workers=1)
    table = open_split(tmp_path / "tokens" / "train")
    rows = [row for value in table.to_pylist() for row in tree_rows(row_to_tree(value))]
    assert len(rows) == 12
    processor = load_processor(str(model), offline=True)
    batch = Collator(processor, media_root=tmp_path / "media")(rows)
    grid = batch["image_grid_thw"]
    assert len(grid) == 12
    assert int(grid.prod(-1).sum()) // 4 == int((batch["input_ids"] == processor.image_token_id).sum())


def test_wrong_sizes_in_the_data_are_noticed(tmp_path: Path, model: Path, capsys: Any) -> None:
    from dataclasses import replace

    (tmp_path / "media").mkdir()
    rows = [example(number, tmp_path / "media") for number in range(3)]
    medium = replace(rows[0].messages[0].media[0], width=600, height=600)
    text = rows[0].messages[0].parts[1]
    rows[0] = replace(rows[0], messages=(Message("user", (medium, text)), rows[0].messages[1]))
    prepare(tmp_path, rows)
    run(tmp_path, model, workers=1)
    notes = read_manifest(tmp_path / "tokens").facts["notes"]
    assert any("is not that of" in note for note in notes)


def test_a_finished_folder_is_found_again_without_its_processor(tmp_path: Path, model: Path, monkeypatch: Any) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    prepare(tmp_path, examples_in(tmp_path / "media"))
    made = run(tmp_path, own, workers=1)
    loads = []
    load = stage.load_processor
    monkeypatch.setattr(stage, "load_processor", lambda *given, **more: loads.append(given) or load(*given, **more))
    assert run(tmp_path, own, workers=1)["cached"] and not loads
    # Other bytes that say the same load it, and make nothing anew; another template does.
    settings = own / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert run(tmp_path, own, workers=1)["cached"] and loads
    template = own / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "person", 1) + "{# other #}")
    assert not run(tmp_path, own, workers=1)["cached"] and made["cached"] is False
    # So do weights that are others not: they make no ids.
    loads.clear()
    (own / "model.safetensors").write_bytes(b"")
    assert run(tmp_path, own, workers=1)["cached"] and not loads

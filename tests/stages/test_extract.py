"""extract on real small files: what is in features/, what is kept, what is refused, and what a stop leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from mmtune.errors import CapabilityError, DataError, RecipeError
from mmtune.features.index import open_index
from mmtune.features.neighbours import nearest
from mmtune.features.table import open_features
from mmtune.models.inputs import load_preparation
from mmtune.models.unimodal import load_unimodal
from mmtune.recipe import Recipe
from mmtune.stages.extract import extract, filling
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from tests.stages.extracted import BUILT, SMALL, picture, pictures, recipe, run


def by_hand(folder: Path, files: list[Path]) -> list:
    """Features of the files by the encoder alone, in the batches of the stage."""
    prepare, encoder = load_preparation(str(folder), "image"), load_unimodal(str(folder), "image")
    inputs = [prepare.inputs(Image.open(file).convert("RGB")) for file in files]
    return [made for start in range(0, len(files), 4) for made in encoder(inputs[start : start + 4])]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_cached_features_are_the_live_ones(dtype, tmp_path):
    folder = pictures(tmp_path / "media", 6)
    _, out = run(recipe(tmp_path, folder, dtype=dtype))
    table = open_features(out, "image")
    assert table.ids == [f"a/{number:02}.png" for number in range(6)]
    for row, live in enumerate(by_hand(out / "encoders" / "image", [folder / name for name in table.ids])):
        kept = table.tokens(row)
        if dtype == "fp32":
            np.testing.assert_array_equal(kept, live.tokens)
        else:
            assert kept.dtype == np.float16
            np.testing.assert_allclose(kept, live.tokens, atol=1e-3, rtol=1e-3)
        np.testing.assert_array_equal(table.pooled()[row], live.pooled)


def test_the_folder_opens_with_datasets_and_its_index_finds_each_by_itself(tmp_path):
    result, out = run(recipe(tmp_path, pictures(tmp_path / "media")))
    loaded = datasets.load_from_disk(str(out))
    assert list(loaded) == ["image"] and loaded["image"].column_names[-2:] == ["tokens", "pooled"]
    assert loaded["image"][0]["splits"] == ["train"]
    assert np.shape(loaded["image"][0]["tokens"]) == (16, 32)
    manifest = json.loads((out / "manifest.json").read_text())
    index = open_index(out / "index" / "image", source=manifest["facts"]["fingerprints"]["image"])
    vectors = open_features(out, "image").pooled()
    rows, _ = index.search(vectors, 3)
    assert rows[:, 0].tolist() == list(range(12))
    np.testing.assert_array_equal(rows, nearest(vectors, vectors, 3)[0])
    assert result["rows"] == {"image": 12} and result["index"]["image"]["count"] == 12


OPENED: list[str] = []
sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" else None)


@pytest.mark.parametrize("change", [{}, {"index": {"metric": "l2"}}, {"reduce": {"width": 2}}])
def test_a_second_run_opens_no_file_of_the_media(change, tmp_path):
    folder = pictures(tmp_path / "media")
    OPENED.clear()
    run(recipe(tmp_path, folder))
    assert len({path for path in OPENED if path.startswith(str(folder))}) == 12
    OPENED.clear()
    result, _ = run(recipe(tmp_path, folder, **change))
    assert result["cached"] == (not change)
    assert not [path for path in OPENED if path.startswith(str(folder))] and OPENED


def test_a_second_run_opens_no_medium_and_a_changed_file_alone_is_made_again(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "media")
    asked = recipe(tmp_path, folder)
    _, out = run(asked)
    before = open_features(out, "image").pooled()
    opened = []
    monkeypatch.setattr(filling.Preparer, "_one", counting(filling.Preparer._one, opened))
    assert run(asked)[0]["cached"] and not opened
    picture(folder / "a" / "03.png", 99)
    picture(folder / "a" / "99.png", 100)
    os.utime(folder / "a" / "05.png", ns=(1, 1))
    result, _ = run(asked)
    assert sorted(opened) == ["a/03.png", "a/99.png"]
    assert result["kept"] == {"image": 11} and result["rows"] == {"image": 13}
    after = open_features(out, "image")
    changed = [row for row in range(12) if not np.array_equal(after.pooled()[row], before[row])]
    assert changed == [3] and after.ids[12] == "a/99.png"
    assert after.stands()["a/05.png"][1] == 1


def test_damaged_features_are_made_again_and_not_carried_on(tmp_path):
    folder = pictures(tmp_path / "media")
    asked = recipe(tmp_path, folder)
    _, out = run(asked)
    (file,) = (out / "image").glob("data-*.arrow")
    before, whole = open_features(out, "image").pooled(), file.read_bytes()
    place = whole.index(before[4].tobytes())
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    picture(folder / "a" / "99.png", 100)
    result, _ = run(asked)
    assert result["kept"] == {"image": 0} and result["rows"] == {"image": 13}
    np.testing.assert_array_equal(open_features(out, "image").pooled()[:12], before)


def counting(one, opened: list[str]):
    def counted(self, unit):
        opened.append(unit.id)
        return one(self, unit)

    return counted


@pytest.mark.parametrize(
    "change", [{"encoders.image.pool": "stats"}, {"encoders.image.config": {**SMALL, "patch_size": 16}}]
)
def test_another_encoder_is_said_and_nothing_of_the_old_one_is_kept(change, tmp_path):
    folder = pictures(tmp_path / "media")
    run(recipe(tmp_path, folder))
    ((_, _, key), value) = next((name.split("."), value) for name, value in change.items())
    talk = Talk(quiet=True)
    asked = recipe(tmp_path, folder, encoders={"image": {**BUILT["image"], key: value}})
    result = extract(asked, console=talk)
    assert not result["cached"] and result["kept"] == {"image": 0} and result["rows"] == {"image": 12}
    assert any("again, because of config.encoders.image" in line for line in talk.lines)


def test_changed_weights_of_a_named_encoder_are_noticed(tmp_path):
    folder, encoder = pictures(tmp_path / "media", 4), tmp_path / "vit"
    save_vit(encoder, seed=0)
    asked = recipe(tmp_path, folder, encoders={"image": str(encoder)})
    run(asked)
    assert run(asked)[0]["cached"]
    save_vit(encoder, seed=1)
    result = run(asked)[0]
    assert not result["cached"] and result["kept"] == {"image": 0}


def save_vit(folder: Path, seed: int) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(seed)
    config = tf.ViTConfig(**SMALL, num_attention_heads=4, image_size=32, patch_size=16)
    tf.ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def test_bad_media_are_refused_by_name_and_all_is_counted(tmp_path, capsys):
    folder = pictures(tmp_path / "media", 3)
    bad = folder / "b"
    picture(bad / "one_pixel.png", 0, (1, 1))
    (bad / "cut.png").write_bytes((folder / "a" / "00.png").read_bytes()[:200])
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.wav").write_text("no sound")
    (bad / "notes.md").write_text("no medium")
    Image.new("CMYK", (20, 20), (9, 8, 7, 6)).save(bad / "cmyk.jpg")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(bad / "sixteen.png")
    result, out = run(recipe(tmp_path, folder))
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rejects} == {
        "f/b/notes.md": "not_media",
        "b/cut.png": "decode_error",
        "b/empty.png": "decode_error",
        "b/text.wav": "decode_error",
    }
    assert {"b/one_pixel.png", "b/cmyk.jpg", "b/sixteen.png"} <= set(open_features(out, "image").ids)
    assert result["rows"]["image"] + result["failed"]["image"] == result["distinct"]["image"]
    assert result["failed"]["audio"] == result["distinct"]["audio"] == 1
    assert sum(result["drops"].values()) == len(rejects)
    assert "note: refused 1 row and 3 units: " in capsys.readouterr().err
    (bad / "cut.png").unlink(), (bad / "empty.png").unlink(), (bad / "text.wav").unlink()
    run(recipe(tmp_path, folder))
    assert "note: refused 1 row: not_media 1" in capsys.readouterr().err


def test_pooled_vectors_alone(tmp_path):
    _, out = run(recipe(tmp_path, pictures(tmp_path / "media", 3), tokens=False, index={"kind": "none"}))
    table = open_features(out, "image")
    assert table.pooled().shape == (3, 32) and not (out / "index").exists()
    facts = read_manifest(out).facts
    assert facts["width"] == {"image": 32} and "tokens" not in facts and facts["refused_units"] == 0
    with pytest.raises(DataError, match="no tokens"):
        table.tokens(0)


def test_the_towers_of_finetune_stay(tmp_path):
    folder = pictures(tmp_path / "media", 3)
    towers = tmp_path / "run" / "features" / "towers"
    towers.mkdir(parents=True)
    (towers / "shard").write_text("kept")
    asked = recipe(tmp_path, folder)
    run(asked)
    run(asked, force=True)
    assert (towers / "shard").read_text() == "kept"
    assert run(asked)[0]["cached"]


def test_the_number_of_workers_changes_nothing(tmp_path):
    folder = pictures(tmp_path / "media", 40)
    (one, first), (two, second) = (
        run(recipe(tmp_path / name, folder, workers=count)) for name, count in (("one", 1), ("two", 2))
    )
    assert one["rows"] == two["rows"]
    names = ("image/data-00000-of-00001.arrow", "index/image/vectors.npy")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_what_is_asked_for_must_be_there(tmp_path, tiny_vlm):
    folder = pictures(tmp_path / "media", 2)
    with pytest.raises(DataError, match="hold no audio"):
        run(recipe(tmp_path, folder, modalities=["audio"]))
    (folder / "SOURCE.md").touch()
    with pytest.raises(DataError, match=r"hold no text$"):
        run(recipe(tmp_path, folder, modalities=["text"]))
    (tmp_path / "h.jsonl").write_text('{"h": ["1"], "a": "2"}')
    past = {"id": "h", "reader": "table", "path": str(tmp_path / "h.jsonl"), "columns": {"history": "h", "answer": "a"}}
    of_base = {"encoders": {"behaviour": "base"}}
    with pytest.raises(RecipeError, match=r"hold behaviour, and the base model gives no features of it$"):
        run(Recipe(run_dir=tmp_path / "run", sources=[past], model={"path": str(tiny_vlm)}, extract=of_base))
    with pytest.raises(RecipeError, match="no encoder of it is named"):
        run(recipe(tmp_path, folder, encoders={}))
    with pytest.raises(RecipeError, match="hiden_size"):
        run(recipe(tmp_path, folder, encoders={"image": {"config": {"hiden_size": 3}}}))
    with pytest.raises(RecipeError, match="multiple of twice"):
        run(recipe(tmp_path, folder, encoders={"image": {"config": {"hidden_size": 30}}}))
    with pytest.raises(CapabilityError, match=r"not on this machine|cannot be loaded"):
        run(recipe(tmp_path, folder, encoders={"image": "no/such-model"}), offline=True)
    assert not (tmp_path / "run" / "features").exists()


RUN = """
import os, sys, time
from pathlib import Path
from mmtune.__main__ import main
from mmtune.stages.extract import filling
filling._PART_UNITS = 4
write = filling.write_part
def slow(*given):
    write(*given)
    print("part", flush=True, file=sys.__stdout__)
    time.sleep(float(os.environ["MMTUNE_TEST_PAUSE"]))
filling.write_part = slow
main()
"""


def command(recipe_file: Path, pause: float) -> subprocess.Popen:
    environ = {**os.environ, "MMTUNE_TEST_PAUSE": str(pause), "PYTHONPATH": str(Path.cwd())}
    line = [sys.executable, "-c", RUN, "extract", str(recipe_file)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_stopped_run_goes_on_after_its_last_part(number, code, tmp_path):
    folder = pictures(tmp_path / "media", 20)
    file = tmp_path / "r.yaml"
    keys = {
        "run_dir": "run",
        "sources": [{"id": "f", "reader": "folder", "path": str(folder)}],
        "extract": {"encoders": {"image": BUILT["image"]}, "batch_rows": 4, "workers": 1},
    }
    file.write_text(json.dumps(keys))
    process = command(file, 30)
    assert process.stdout is not None and process.stdout.readline() == "part\n"
    time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "run" / "features").exists()
    process = command(file, 0)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert out.count("part") == 4 and "going on after 4 of 20" in said
    unbroken = tmp_path / "again.yaml"
    unbroken.write_text(json.dumps({**keys, "run_dir": "again"}))
    assert command(unbroken, 0).wait(120) == 0
    name = "features/image/data-00000-of-00001.arrow"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert not (tmp_path / "run" / ".features.journal").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_rate_leaves_out_what_loading_took(tmp_path, monkeypatch, workers):
    def slowly(*args, **settings):
        time.sleep(2)
        return load_unimodal(*args, **settings)

    monkeypatch.setattr("mmtune.models.unimodal.load_unimodal", slowly)
    monkeypatch.setattr(filling, "_INLINE_BATCHES", 0)
    talk = Talk(quiet=True)
    asked = recipe(tmp_path, pictures(tmp_path / "media", 8), workers=workers)
    extract(asked, console=talk)
    whole = read_manifest(asked.run_dir / "features").timings["image_seconds"]
    rate, start = re.search(r"([\d.,]+) rows/s after ([\d.]+) s of start-up", "\n".join(talk.lines)).groups()
    # Both are told rounded.
    assert 2 <= float(start) < whole + 0.06
    working, told = whole - float(start), float(rate.replace(",", ""))
    # Work shorter than what rounding hides has no greatest rate.
    most = 8 / (working - 0.06) if working > 0.06 else float("inf")
    assert 8 / (working + 0.06) - 0.1 <= told <= most + 0.1

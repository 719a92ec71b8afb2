"""extract on real small files: what is in features/, what is kept, what is refused, and what a stop leaves."""

import json
import os
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
from mmtune.features.units import text_id
from mmtune.media.video import probe_video
from mmtune.models.encoders import HistoryConfig, LogMelConfig, PatchesConfig
from mmtune.models.fusion import time_positions
from mmtune.models.inputs import load_preparation, longest_sound
from mmtune.models.unimodal import load_unimodal
from mmtune.recipe import Recipe
from mmtune.records import Medium
from mmtune.stages.extract import extract, filling
from mmtune.stages.extract.encoders import SETTINGS, TIMES_SECONDS
from mmtune.storage import read_manifest
from mmtune.talk import Talk

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
BUILT = {
    "image": {"config": SMALL},
    "audio": {"config": {**SMALL, "sampling_rate": 8000, "num_mel_bins": 40}},
    "behaviour": {"config": {**SMALL, "window": 4}},
}


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def pictures(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        picture(folder / "a" / f"{number:02}.png", number)
    return folder


def recipe(tmp_path: Path, folder: Path, **settings) -> Recipe:
    source = {"id": "f", "reader": "folder", "split": "train", "path": str(folder)}
    return Recipe(
        run_dir=tmp_path / "run",
        sources=[source],
        extract={"encoders": BUILT, "batch_rows": 4, "workers": 1, **settings},
    )


def run(asked: Recipe, **options) -> tuple[dict, Path]:
    return extract(asked, console=Talk(quiet=True), **options), asked.run_dir / "features"


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


def test_bad_media_are_refused_by_name_and_all_is_counted(tmp_path):
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


def sounds(folder: Path) -> Path:
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, samples, rate in (
        ("plain.wav", rng.normal(0, 0.1, 5000), 8000),
        ("stereo.wav", rng.normal(0, 0.1, (3000, 2)), 8000),
        ("fast.wav", rng.normal(0, 0.1, 9000), 44100),
        ("short.wav", rng.normal(0, 0.1, 3), 8000),
        ("nan.wav", np.full(2000, np.nan), 8000),
        ("nothing.wav", np.zeros(0), 8000),
    ):
        soundfile.write(folder / name, samples, rate, subtype="FLOAT")
    soundfile.write(folder / "eight_bit.wav", rng.normal(0, 0.1, 2000), 8000, subtype="PCM_U8")
    return folder


def test_sounds_of_any_kind_have_features_of_their_own_length(tmp_path):
    result, out = run(recipe(tmp_path, sounds(tmp_path / "media" / "x").parent))
    table = open_features(out, "audio")
    lengths = {name: len(table.tokens(row)) for row, name in enumerate(table.ids)}

    def count(samples):
        # Windows of 400 samples every 160, halved twice.
        return -(-(max(samples, 400) // 160) // 4)

    assert lengths == {
        "x/eight_bit.wav": count(2000),
        "x/fast.wav": count(-(-9000 * 8000 // 44100)),
        "x/plain.wav": count(5000),
        "x/short.wav": count(3),
        "x/stereo.wav": count(3000),
    }
    assert result["drops"] == {"bad_samples": 1, "decode_error": 1}


def test_texts_are_kept_once_and_found_by_their_words(tmp_path, tiny_vlm):
    rows = [{"q": "what is it?", "a": "1"}, {"q": "how many?", "a": "2"}, {"q": "what is it?", "a": "3"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"question": "q", "answer": "a"}
    same = {"id": "t", "reader": "table", "path": str(tmp_path / "rows.jsonl"), "columns": columns}
    asked = Recipe(
        run_dir=tmp_path / "run",
        model={"path": str(tiny_vlm)},
        sources=[{**same, "split": "train"}, {**same, "split": "test"}],
        extract={"dtype": "fp32", "batch_rows": 1},
    )
    _, out = run(asked)
    table = open_features(out, "text")
    assert table.table.column("text").to_pylist() == ["what is it?", "how many?"]
    assert table.table.column("splits").to_pylist() == [["train", "test"]] * 2
    row = table.row_of(text_id("how many?"))
    ids = tf.AutoTokenizer.from_pretrained(tiny_vlm)("how many?", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        model = tf.AutoModel.from_pretrained(tiny_vlm).language_model
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    np.testing.assert_array_equal(table.tokens(row), states)
    np.testing.assert_allclose(table.pooled()[row], states.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["history", "behaviour"])
def test_histories_are_told_by_order_and_unknown_and_empty_ones_have_features(name, tmp_path):
    rows = [["1", "2", "3"], ["2", "1", "3"], ["1", "2", "3"], [], ["9"]]
    for split, own in (("train", rows[:4]), ("test", rows[4:])):
        lines = [json.dumps({"past": past, "next": "4"}) for past in own]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    columns = {name: "past", "answer": "next"}
    sources = [
        {"id": "b", "reader": "table", "split": split, "path": str(tmp_path / f"{split}.jsonl"), "columns": columns}
        for split in ("train", "test")
    ]
    extract_keys = {"encoders": BUILT, "dtype": "fp32"}
    _, out = run(Recipe(run_dir=tmp_path / "run", sources=sources, extract=extract_keys))
    table = open_features(out, "behaviour")
    assert table.table.column("text").to_pylist() == ["1\n2\n3", "2\n1\n3", "", "9"]
    vectors = table.pooled()
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4
    assert json.loads((out / "encoders" / "behaviour" / "items.json").read_text()) == ["1", "2", "3"]
    assert len(table.tokens(2)) == 1 and np.isfinite(vectors).all()
    assert not np.array_equal(vectors[2], vectors[3])


@pytest.mark.parametrize(("text", "items"), [("1 2,3|4", ("1", "2", "3", "4")), ("", ())])
def test_a_history_of_a_csv_is_split(text, items, tmp_path):
    from mmtune.readers.source import SourceFiles
    from mmtune.readers.table import read_table

    (tmp_path / "rows.csv").write_text(f'past,next\n"{text}",7\n')
    columns = {"history": "past", "answer": "next"}
    (record,) = read_table(SourceFiles("b", "train", path=tmp_path / "rows.csv", columns=columns))
    assert record.history == items


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


def test_a_video_is_its_frames_told_their_seconds(repository, tmp_path):
    clip = min((repository / "data" / "clips").rglob("*.mp4"))
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / clip.name).write_bytes(clip.read_bytes())
    source = {"id": "v", "reader": "folder", "path": str(tmp_path / "media"), "columns": {"label": "([a-z])"}}
    keys = {"encoders": BUILT, "dtype": "fp32", "video_frames": 5, "workers": 1}
    _, out = run(Recipe(run_dir=tmp_path / "run", sources=[source], extract=keys))
    table = open_features(out, "video")
    tokens, pooled = table.tokens(0), table.pooled()[0]
    with open(clip, "rb") as handle:
        probed = probe_video(handle, Medium("video", clip.name), max_pixels=10**8, max_seconds=60, decode=False)
    shown = torch.linspace(0, probed.seconds * (probed.frames - 1) / probed.frames, 5)
    waves = time_positions.time_waves(shown, 32).numpy()
    loudness = np.median((tokens.mean(0) - pooled) / waves.mean(0))
    frames = tokens - loudness * waves
    np.testing.assert_allclose(frames.mean(0), pooled, atol=1e-4)
    assert loudness == pytest.approx(np.sqrt(2 * np.mean(frames**2)), rel=1e-3)


def test_times_of_frames_are_those_that_models_are_told():
    assert TIMES_SECONDS == (time_positions.SHORTEST_SECONDS, time_positions.LONGEST_SECONDS)


def test_settings_of_the_small_encoders_are_those_of_their_configs():
    for kind, config in (("image", PatchesConfig), ("audio", LogMelConfig), ("behaviour", HistoryConfig)):
        assert set(SETTINGS[kind]) == set(config.__annotations__) - {
            "num_channels",
            "vocab_size",
            "pad_token_id",
            "unknown_rate",
        }


def test_a_deviation_of_nothing_is_refused(tmp_path):
    asked = recipe(tmp_path, pictures(tmp_path / "media", 1), encoders={"image": {"config": {"image_std": 0}}})
    with pytest.raises(RecipeError, match=r"encoders\.image\.config\.image_std: 0 is no number above 0"):
        run(asked)


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


def test_a_sound_that_the_encoder_would_cut_is_refused(tmp_path):
    import soundfile
    import transformers as t

    small = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "decoder_layers": 1, "vocab_size": 60}
    small |= {"decoder_attention_heads": 2, "max_source_positions": 100, "num_mel_bins": 80, "pad_token_id": 0}
    t.WhisperModel(t.WhisperConfig(**small)).save_pretrained(tmp_path / "whisper")
    t.WhisperFeatureExtractor(chunk_length=2).save_pretrained(tmp_path / "whisper")
    (tmp_path / "media" / "x").mkdir(parents=True)
    for name, samples in (("whole", 32_000), ("over", 32_001), ("long", 80_000)):
        soundfile.write(tmp_path / "media" / "x" / f"{name}.wav", np.full(samples, 0.1), 16_000)
    result, out = run(recipe(tmp_path, tmp_path / "media", encoders={"audio": {"path": str(tmp_path / "whisper")}}))
    assert result["drops"] == {"media_too_long": 2} and open_features(out, "audio").ids == ["x/whole.wav"]
    assert "is 5.0 s long; the encoder hears 2 s" in (out / "rejects.jsonl").read_text()


def test_the_longest_sound_is_the_last_that_is_heard_whole():
    import transformers as t

    for extractor in (
        t.WhisperFeatureExtractor(chunk_length=2),
        t.ASTFeatureExtractor(num_mel_bins=32, max_length=64),
    ):
        longest = longest_sound(extractor)

        def made(samples, extractor=extractor):
            found = extractor([samples.astype(np.float32)], sampling_rate=16_000, return_tensors="np")
            return next(iter(found.values()))

        quiet = np.sin(np.arange(longest + 160) / 9) * 0.1
        cut, early = quiet.copy(), quiet.copy()
        cut[longest:], early[longest - 160 : longest] = 0.9, 0.9
        assert np.array_equal(made(quiet), made(cut)), type(extractor)
        assert not np.array_equal(made(quiet), made(early)), type(extractor)
    assert longest_sound(t.Wav2Vec2FeatureExtractor()) == 0

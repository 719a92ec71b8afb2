"""extract of sounds, texts, histories and videos: what each is told as, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from mmtune.errors import RecipeError
from mmtune.features.table import open_features
from mmtune.features.units import text_id
from mmtune.media.video import probe_video
from mmtune.models.encoders import HistoryConfig, LogMelConfig, PatchesConfig
from mmtune.models.fusion import time_positions
from mmtune.models.inputs import longest_sound
from mmtune.recipe import Recipe
from mmtune.records import Medium
from mmtune.stages.extract.encoders import SETTINGS, TIMES_SECONDS
from tests.stages.extracted import BUILT, pictures, recipe, run


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

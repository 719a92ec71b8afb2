"""The bundled sounds and clips are what their scripts say: true answers, disjoint voices and scans, no way around."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_bundled_data import DATA, load_script, scenes_of

SPLITS = ("train", "val", "test")


def rows_of(kind: str, split: str) -> list[dict[str, Any]]:
    packed = (DATA / kind / "annotations" / f"{split}.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]


@pytest.mark.parametrize("split", SPLITS)
def test_every_sound_is_there_and_its_answers_are_true(split: str) -> None:
    import soundfile

    make_sounds = load_script("make_sounds")
    words = [word for word, _ in make_sounds.WORDS]
    voices = {voice.number: voice for voice in make_sounds.make_voices(split)}
    scenes, rows = scenes_of(split), rows_of("sounds", split)
    assert len({row["id"] for row in rows}) == len(rows) == 4 * 10 * len(voices)
    for row in rows:
        digit, voice = words.index(row["word"]), voices[row["voice"]]
        assert row["audio"] == f"{row['word']}_{row['voice']:03d}.flac"
        truths = {"word": row["word"], "digit": str(digit), "voice": "low" if voice.pitch_hz < 150 else "high"}
        if row["question_type"] == "match":
            (shown,) = scenes[int(row["image"].removesuffix(".png"))]["digits"]
            truths["match"] = "yes" if shown["digit"] == digit else "no"
        assert row["answer"] == truths[row["question_type"]], row
    assert {row["audio"] for row in rows} == {path.name for path in (DATA / "sounds" / split).iterdir()}
    for name in sorted({row["audio"] for row in rows})[:10]:
        info = soundfile.info(DATA / "sounds" / split / name)
        assert (info.samplerate, info.channels) == (make_sounds.RATE_HZ, 1)
        assert 0.1 < info.duration < 1.0


def test_neither_the_picture_nor_the_sound_alone_tells_whether_they_match() -> None:
    rows = [row for row in rows_of("sounds", "test") if row["question_type"] == "match"]
    assert Counter(row["answer"] for row in rows) == {"yes": len(rows) // 2, "no": len(rows) // 2}
    for clue in ("word", "voice", "shown"):
        by_clue: dict[Any, Counter[str]] = defaultdict(Counter)
        for row in rows:
            by_clue[row[clue]][row["answer"]] += 1
        # With ten or twenty values of a clue, chance alone gives some more than half.
        assert sum(max(found.values()) for found in by_clue.values()) <= 0.68 * len(rows), clue


def test_splits_share_no_voice() -> None:
    make_sounds = load_script("make_sounds")
    voices = [{(v.pitch_hz, v.tract_scale) for v in make_sounds.make_voices(split)} for split in SPLITS]
    numbers = [{row["voice"] for row in rows_of("sounds", split)} for split in SPLITS]
    for sets in (voices, numbers):
        assert len(set.union(*sets)) == sum(map(len, sets))


@pytest.mark.parametrize("split", SPLITS)
def test_the_script_says_the_same_words_and_asks_the_same(split: str) -> None:
    import soundfile

    make_sounds = load_script("make_sounds")
    sounds = make_sounds.make_sounds(split)
    assert list(make_sounds.rows_of(split, sounds)) == rows_of("sounds", split)
    for sound in sounds[:: len(sounds) // 10]:
        found, rate = soundfile.read(DATA / "sounds" / split / sound.name)
        made = make_sounds.say(sound)
        # Eight bits; sines may differ in their last bit between machines.
        assert rate == make_sounds.RATE_HZ and len(found) == len(made)
        np.testing.assert_allclose(found, made, atol=1.01 / 128, rtol=0)


def test_a_word_in_two_voices_is_nearer_to_itself_than_to_other_words() -> None:
    """Mean log-mel pictures on ten time steps: a nearest word of the training voices is the word that is said."""
    from mmtune.models.log_mel import LogMelFeatureExtractor

    make_sounds = load_script("make_sounds")
    extractor = LogMelFeatureExtractor(40, make_sounds.RATE_HZ, n_fft=200, hop_length=80)

    def picture(sound: Any) -> np.ndarray:
        mel = extractor(make_sounds.say(sound).astype(np.float32)).input_features[0].numpy()
        return mel[:, np.linspace(0, mel.shape[1] - 1, 10).round().astype(int)].ravel()

    taught, heard = make_sounds.make_sounds("train")[:160], make_sounds.make_sounds("test")[:100]
    known = np.stack([picture(sound) for sound in taught])
    right = 0
    for sound in heard:
        nearest = int(np.square(known - picture(sound)).sum(1).argmin())
        right += taught[nearest].word == sound.word
    assert right >= 85, right


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_true_and_neither_medium_tells_whether_they_agree(split: str) -> None:
    make_pairs = load_script("make_pairs")
    scenes, rows = scenes_of(split), []
    for kind in make_pairs.QUESTIONS:
        own = rows_of("pairs", f"{kind}_{split}")
        assert own == list(make_pairs.rows_of(kind, split))
        rows += own
    assert len({row["id"] for row in rows}) == len(rows) == 2 * make_pairs.ROWS[split]
    met: Counter[tuple[int, int]] = Counter()
    for row in rows:
        (shown,) = scenes[int(row["image"].removesuffix(".png"))]["digits"]
        said = make_pairs.WORDS.index(row["audio"].split("_")[0])
        assert (DATA / "sounds" / split / row["audio"]).is_file()
        if row["id"].startswith("twin"):
            assert row["answer"] == str(shown["digit"]) == str(said)
        else:
            assert row["answer"] == ("yes" if shown["digit"] == said else "no")
            met[shown["digit"], said] += 1
    assert set(met) == {(0, 0), (0, 1), (1, 0), (1, 1)} and len(set(met.values())) == 1


def decoded(path: Path) -> list[np.ndarray]:
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true_of_what_a_clip_shows(split: str) -> None:
    make_clips = load_script("make_clips")
    rows = rows_of("clips", split)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        digits, kind = [str(digit) for digit in row["shown"]["digits"]], row["question_type"]
        if kind == "way":
            assert tuple(row["shown"]["corners"]) in make_clips.WAYS[row["answer"]]
        elif kind in ("after", "before"):
            named = digits.index(row["question"].removesuffix("?").split()[-1])
            assert row["answer"] == digits[named + (1 if kind == "after" else -1)]
        else:
            truths = {"moving digit": digits[0], "first": digits[0], "last": digits[-1], "list": " ".join(digits)}
            assert row["answer"] == truths[kind], row
    assert {row["video"] for row in rows} == {path.name for path in (DATA / "clips" / split).iterdir()}


@pytest.mark.parametrize("split", SPLITS)
def test_decoded_frames_show_what_the_script_draws(split: str) -> None:
    pytest.importorskip("av", reason="PyAV reads the clips; it is in the extra `video`")
    pytest.importorskip("sklearn", reason="scikit-learn brings the scans; it is in the dev extra")
    make_clips = load_script("make_clips")
    scenes = make_clips.load_scenes_script()
    scans, classes = scenes.load_scans()
    clips = make_clips.draw_clips(split, scenes.split_scans(classes)[split], scenes)
    assert json.loads(json.dumps(list(make_clips.rows_of(split, clips)))) == rows_of("clips", split)
    for clip in clips[:12]:
        drawn, found = (
            list(make_clips.frames_of(clip, scans, scenes)),
            decoded(DATA / "clips" / split / clip.name),
        )
        assert len(found) == len(drawn) == make_clips.FRAMES
        for frame, wanted in zip(found, drawn, strict=True):
            # Brightness to a few steps in 255; colours live in half the resolution.
            light = np.array([0.299, 0.587, 0.114])
            assert np.abs(frame @ light - wanted @ light).mean() < 6
        weights = [np.abs(frame - frame[0, 0].astype(int)).sum(-1) for frame in (found[0], found[-1])]
        if clip.way:
            (top, left), (low, right) = (_centre(weight) for weight in weights)
            moved = {"right": right - left, "left": left - right, "down": low - top, "up": top - low}
            assert max(moved, key=lambda way: moved[way]) == clip.way and moved[clip.way] > 18


def _centre(weights: np.ndarray) -> tuple[float, float]:
    rows, columns = np.indices(weights.shape)
    heavy = np.where(weights > weights.max() / 3, weights, 0)
    return float((rows * heavy).sum() / heavy.sum()), float((columns * heavy).sum() / heavy.sum())


def test_clips_of_different_splits_share_no_scan() -> None:
    scans = [{scan for row in rows_of("clips", split) for scan in row["shown"]["scans"]} for split in SPLITS]
    assert len(set.union(*scans)) == sum(map(len, scans))


def test_where_a_digit_is_does_not_tell_which_way_it_moves() -> None:
    """The best answer to one frame whose time is not known is right every second time."""
    make_clips = load_script("make_clips")
    corners = make_clips.load_scenes_script().CORNERS
    asked = [row for split in SPLITS for row in rows_of("clips", split) if row["question_type"] == "way"]
    seen: dict[Any, Counter[str]] = defaultdict(Counter)
    for row in asked:
        start, end = (np.array(corners[corner]) for corner in row["shown"]["corners"])
        for frame in range(make_clips.FRAMES):
            place = tuple((start + (end - start) * frame / (make_clips.FRAMES - 1)).round().astype(int))
            seen[place][row["answer"]] += 1
    best = sum(max(found.values()) for found in seen.values())
    assert best <= 0.6 * len(asked) * make_clips.FRAMES, best / len(asked) / make_clips.FRAMES


def test_one_frame_shows_the_digit_after_or_before_no_more_than_every_second_time() -> None:
    rows = [row for split in SPLITS for row in rows_of("clips", split) if row["question_type"] in ("after", "before")]
    for place in range(3):
        shown = sum(row["answer"] == str(row["shown"]["digits"][place]) for row in rows)
        assert shown <= 0.56 * len(rows), (place, shown / len(rows))


def test_sounds_and_clips_stay_small() -> None:
    for kind in ("sounds", "clips"):
        assert sum(path.stat().st_size for path in (DATA / kind).rglob("*") if path.is_file()) < 2_000_000, kind


@pytest.mark.parametrize(("kind", "least"), [("word", 17), ("voice", 17), ("match", 14)])
def test_the_omni_base_hears_what_is_said_and_by_whom(kind: str, least: int) -> None:
    """Loaded as any model folder is, it answers 20 held-out questions; by chance 2, 10 and 10 right."""
    import soundfile
    import torch
    from PIL import Image

    from mmtune.encoding.processor import load_processor
    from mmtune.models.load import load_model

    model, processor = load_model(str(DATA / "omni")).eval(), load_processor(str(DATA / "omni"))
    assert set(processor.tokenizer.extra_special_tokens) >= {"<|im_start|>", "<image>", "<audio>"}
    rows = [row for row in rows_of("sounds", "test") if row["question_type"] == kind]
    right = 0
    for row in rows[:: len(rows) // 20]:
        media = [{"type": "image"}, {"type": "audio"}] if row["image"] else [{"type": "audio"}]
        talk = [{"role": "user", "content": [*media, {"type": "text", "text": row["question"]}]}]
        sound, rate = soundfile.read(DATA / "sounds" / "test" / row["audio"], dtype="float32")
        pictures = [Image.open(DATA / "scenes" / "test" / row["image"])] if row["image"] else None
        given = processor(
            text=processor.apply_chat_template(talk, add_generation_prompt=True),
            images=pictures,
            audio=[sound],
            sampling_rate=rate,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(made, skip_special_tokens=True).strip() == row["answer"]
    assert right >= least, right


def test_the_omni_base_takes_pictures_and_stays_small() -> None:
    from PIL import Image

    from mmtune.encoding.processor import load_processor

    processor = load_processor(str(DATA / "omni"))
    with Image.open(next((DATA / "scenes" / "test").iterdir())) as image:
        given = processor(images=image, text="<image>What digit is this?", return_tensors="pt")
    assert (given["input_ids"] == processor.image_token_id).sum() == 16
    assert sum(path.stat().st_size for path in (DATA / "omni").iterdir()) < 10_000_000

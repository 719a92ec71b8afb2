"""What features hold: linear probes on real digits, seen and spoken, beside the worth of what encoders are given."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmtune.features.table import FeatureTable, open_features
from mmtune.models.log_mel import LogMelFeatureExtractor
from mmtune.recipe import Recipe
from mmtune.stages.extract import extract
from mmtune.talk import Talk

OMNI = Path(__file__).parents[2] / "data" / "omni"
SPEECH = {"hidden_size": 64, "sampling_rate": 8000, "n_fft": 200, "hop_length": 80, "num_mel_bins": 40}
PIXELS = {"hidden_size": 64, "image_size": 8, "patch_size": 2, "num_hidden_layers": 1}


def features(tmp_path: Path, folder: Path, kind: str, encoder: dict) -> FeatureTable:
    source = {"id": "d", "reader": "folder", "path": str(folder), "columns": {"label": r"(\d)_[a-z]+_"}}
    settings = {"encoders": {kind: encoder}, "modalities": [kind], "dtype": "fp32", "workers": 1}
    extract(Recipe(run_dir=tmp_path / "run", sources=[source], extract=settings), console=Talk(quiet=True))
    return open_features(tmp_path / "run" / "features", kind)


def probe(vectors: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(vectors[~held_out], labels[~held_out]).score(vectors[held_out], labels[held_out])


def log_mel_statistics(folder: Path, names: list[str]) -> np.ndarray:
    """Mean and deviation over time of every band, ``(N, 2 M)``: what the encoder is given, without any encoder."""
    sizes = {name: SPEECH[name] for name in ("sampling_rate", "n_fft", "hop_length")}
    extractor = LogMelFeatureExtractor(feature_size=SPEECH["num_mel_bins"], **sizes)
    found = []
    for name in names:
        samples, rate = soundfile.read(folder / name, dtype="float32")
        (picture,) = extractor(samples, sampling_rate=rate)["input_features"].numpy()
        found.append(np.concatenate((picture.mean(1), picture.std(1))))
    return np.stack(found)


@pytest.mark.slow
def test_speech_features_tell_the_spoken_digit(tmp_path, shared_datasets):
    folder = shared_datasets / "fsdd" / "recordings"
    table = features(tmp_path / "untrained", folder, "audio", {"config": SPEECH, "pool": "stats"})
    synthetic = features(tmp_path / "synthetic", folder, "audio", {"path": str(OMNI), "pool": "stats"})
    assert synthetic.ids == table.ids
    parts = [Path(name).stem.split("_") for name in table.ids]
    labels, speakers, takes = (np.array([part[at] for part in parts]) for at in range(3))
    held = {
        "encoder": table.pooled(),
        "log-mel": log_mel_statistics(folder, table.ids),
        "omni": synthetic.pooled(),
        "others' features": np.random.default_rng(0).permutation(table.pooled()),
    }
    found = {}
    for name, vectors in held.items():
        unseen = [probe(vectors, labels, speakers == one) for one in np.unique(speakers)]
        found[name] = probe(vectors, labels, takes.astype(int) < 5), np.mean(unseen)
        each = np.round(unseen, 2).tolist()
        print(f"{name}: held-out rows {found[name][0]:.3f}; held-out speakers {found[name][1]:.3f} {each}")
    assert found["encoder"][0] >= 0.90
    assert found["encoder"][1] > 0.2, "unseen speakers are told better than by chance"
    # Random weights add time and mixtures of bands to what the bands' statistics say, and nothing that was learned.
    assert found["encoder"][0] > found["log-mel"][0], found
    # A tower that learned synthetic words tells real ones too, though no better than one that learned nothing.
    assert found["omni"][0] >= 0.8, found
    assert max(found["others' features"]) < 0.2, found


def test_image_features_tell_the_written_digit(tmp_path):
    digits = load_digits()
    folder = tmp_path / "media"
    folder.mkdir()
    some = slice(0, 900)
    for number, (scan, label) in enumerate(zip(digits.images[some], digits.target[some], strict=True)):
        Image.fromarray((scan * 15.9).astype(np.uint8)).save(folder / f"{label}_scan_{number:04}.png")
    table = features(tmp_path, folder, "image", {"config": PIXELS})
    labels = np.array([int(name[0]) for name in table.ids])
    held_out = np.arange(len(labels)) % 5 == 0
    tokens = np.stack([table.tokens(row).ravel() for row in range(len(labels))])
    pixels = np.stack([np.asarray(Image.open(folder / name)).ravel() / 255 for name in table.ids])
    assert probe(pixels, labels, held_out) >= 0.90
    assert probe(tokens, labels, held_out) >= 0.90
    assert probe(np.random.default_rng(0).permutation(tokens), labels, held_out) < 0.3

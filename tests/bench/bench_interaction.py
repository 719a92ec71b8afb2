"""What each fusion learns from real scans and real spoken digits, by `mmtune run`: interaction, redundancy, a gap.

    python tests/bench/bench_interaction.py --data DIR                     # the folder of the free spoken digit dataset
    python tests/bench/bench_interaction.py --data DIR --speaker lucas     # his voice is heard in the test alone

Questions about a picture with one scan (scikit-learn's digits, split as in ``data/``) and a recording, in one training:

- ``xor``: each is of a zero or a one, all four pairs equally often. "Are the two digits the same?" Neither tells alone.
- ``twin``: both are of the same digit, each through noise. "Which digit is it?" Both tell, neither for sure.
- ``seen`` and ``heard``: one of the two alone, clear. "Which digit is it?" The lessons that ``xor`` takes.

Scans and recordings of train and test are disjoint; by the dataset's own rule takes 0 to 4 are test. Five models start
from the bundled text and picture towers and a fresh sound tower: early, late and hybrid fusion, and early fusion that
is given pictures or sounds alone. A line per model: right answers in 100 of the held-out rows of every question;
``twin_seen`` and ``twin_heard`` are those of ``twin`` with the other medium missing, ``xor_nats`` is what an answer of
``xor`` loses (ln 2 = 0.693 for one who does not know). Then the differences that were asked for, with intervals of 95
of 100 and paired tests. The noise was chosen with ``--held-out val`` so that models of one medium read as well after
400 steps on ``twin`` alone (``--questions twin --train-rows 6000``).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from make_scenes import load_scans, split_scans  # noqa: E402

from mmtune.evaluation.intervals import paired_difference  # noqa: E402
from mmtune.models.log_mel import LogMelFeatureExtractor  # noqa: E402

Right = dict[str, dict[str, float]]
SCAN_PX, SIDE_PX = 24, 48
TEST_TAKES, VAL_TAKES = range(5), range(5, 10)
HEARING = {"sampling_rate": 8000, "num_mel_bins": 40, "n_fft": 200, "hop_length": 80}
SOUND_TOWER = {
    **HEARING,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
BOTH = ("image", "audio")
SHARES = {"xor": 1.0, "twin": 0.5, "seen": 0.25, "heard": 0.5}
"""Rows of each question for a row of xor."""
SHOWN = {"xor": BOTH, "twin": BOTH, "seen": ("image",), "heard": ("audio",)}
MODELS = {
    "early": ("early", BOTH),
    "late": ("late", BOTH),
    "hybrid": ("hybrid", BOTH),
    "pictures alone": ("early", ("image",)),
    "sounds alone": ("early", ("audio",)),
}
COMPARED = (
    ("twin", "late", "pictures alone"),
    ("twin", "late", "sounds alone"),
    ("twin_seen", "hybrid", "early"),
    ("twin_heard", "hybrid", "early"),
)


@cache
def sounds_of(folder: Path, split: str, held_out: str, speaker: str | None) -> dict[int, list[Path]]:
    """Returns the recordings of a split by digit; what is kept for val trains where the test is held out."""
    found: dict[int, list[Path]] = {digit: [] for digit in range(10)}
    for path in sorted(folder.glob("*.wav")):
        digit, voice, take = path.stem.split("_")
        tested = int(take) in TEST_TAKES if speaker is None else voice == speaker
        own = "test" if tested else "val" if int(take) in VAL_TAKES and held_out == "val" else "train"
        if own == split:
            found[int(digit)].append(path)
    return found


def samples_of(path: Path) -> np.ndarray:
    """Returns the samples of a recording, ``(S,)`` in -1..1."""
    with wave.open(str(path)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768.0


def log_mel_facts(paths: list[Path]) -> dict[str, float]:
    """Returns mean and deviation of the log-mel values of recordings, for a sound tower."""
    settings = {name: value for name, value in HEARING.items() if name != "num_mel_bins"}
    extractor = LogMelFeatureExtractor(feature_size=HEARING["num_mel_bins"], **settings)
    values = torch.cat([extractor(samples_of(path))["input_features"].flatten() for path in paths])
    return {"mel_mean": round(values.mean().item(), 3), "mel_std": round(values.std().item(), 3)}


def paint(scan: np.ndarray, target: Path, noise: float, draw: np.random.Generator) -> None:
    """Writes a picture with the scan in one of its corners, and noise of a deviation in 0..1 over all of it."""
    canvas = np.zeros((SIDE_PX, SIDE_PX))
    top, left = draw.integers(0, 2, 2) * SCAN_PX
    canvas[top : top + SCAN_PX, left : left + SCAN_PX] = np.kron(scan, np.ones((SCAN_PX // 8,) * 2))
    canvas += noise * draw.normal(size=canvas.shape)
    Image.fromarray((255 * canvas.clip(0, 1)).astype(np.uint8)).convert("RGB").save(target)


def record(source: Path, target: Path, noise: float, draw: np.random.Generator) -> None:
    """Writes a recording with white noise of a deviation relative to its own."""
    samples = samples_of(source)
    samples = samples + noise * samples.std() * draw.normal(size=samples.size)
    samples *= 30_000 / np.abs(samples).max()
    with wave.open(str(target), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(HEARING["sampling_rate"])
        sound.writeframes(samples.astype("<i2").tobytes())


def rows_of(kind: str, split: str, given: argparse.Namespace, out: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of a question and split, writing their media; clear ones once for all rows."""
    scans, classes = load_scans()
    pools = split_scans(classes)[split]
    sounds = sounds_of(given.data / "recordings", split, given.held_out, given.speaker)
    draw, choose = np.random.default_rng([len(kind), len(split)]), random.Random(f"{kind} {split}")
    total = given.train_rows * SHARES[kind] if split == "train" else given.test_rows
    for number in range(int(total)):
        name = f"{kind}_{split}_{number:05}"
        seen, heard = (number % 2, number // 2 % 2) if kind == "xor" else (number % 10,) * 2
        scan, source = choose.choice(pools[seen]), choose.choice(sounds[heard])
        picture, sound = (name, name) if kind == "twin" else (f"scan_{scan}", source.stem)
        if not (out / f"{picture}.png").exists():
            paint(scans[scan], out / f"{picture}.png", given.picture_noise * (kind == "twin"), draw)
        if not (out / f"{sound}.wav").exists():
            record(source, out / f"{sound}.wav", given.sound_noise * (kind == "twin"), draw)
        answer, question = str(seen), "Which digit is it?"
        if kind == "xor":
            answer, question = "yes" if seen == heard else "no", "Are the two digits the same?"
        yield {"id": name, "question": question, "answer": answer, "image": f"{picture}.png", "audio": f"{sound}.wav"}


def write_data(given: argparse.Namespace, out: Path) -> None:
    """Writes media and a table per question and split."""
    for kind in given.questions.split(","):
        for split in ("train", given.held_out):
            lines = [json.dumps(row) + "\n" for row in rows_of(kind, split, given, out)]
            (out / f"{kind}_{split}.jsonl").write_text("".join(lines), "utf-8")


def source_of(name: str, table: Path, split: str, kinds: tuple[str, ...]) -> dict:
    """Returns a source of the recipe that shows some kinds of media."""
    names = {"image": "images", "audio": "audio"}
    columns = {"id": "id", "question": "question", "answer": "answer"} | {names[kind]: kind for kind in kinds}
    folder = str(table.parent)
    return {"id": name, "reader": "table", "split": split, "path": str(table), "columns": columns, "images": folder,
            "audios": folder, "template": "vqa_plain"}  # fmt: skip


def sources_of(kinds: tuple[str, ...], questions: list[str], held_out: str, data: Path) -> list[dict]:
    """Returns the sources of a model that is given these kinds of media."""
    found = []
    for name in questions:
        shown = tuple(kind for kind in SHOWN[name] if kind in kinds)
        if shown:
            found += [source_of(name, data / f"{name}_{split}.jsonl", split, shown) for split in ("train", held_out)]
    if "twin" in questions and kinds == BOTH:
        for name, kind in (("twin_seen", "image"), ("twin_heard", "audio")):
            found.append(source_of(name, data / f"twin_{held_out}.jsonl", held_out, (kind,)))
    return found


def recipe_of(name: str, seed: int, given: argparse.Namespace, data: Path, run_dir: Path) -> dict:
    """Returns the recipe of one model."""
    mode, kinds = MODELS[name]
    heard = sounds_of(given.data / "recordings", "train", given.held_out, given.speaker)
    facts = log_mel_facts([path for paths in heard.values() for path in paths])
    encoders = {"image": str(ROOT / "data" / "base"), "audio": SOUND_TOWER | facts}
    return {
        "run_dir": str(run_dir),
        "seed": seed,
        "sources": sources_of(kinds, given.questions.split(","), given.held_out, data),
        "tokenize": {"max_length": 256, "layout": "rows"},
        "pretrain": {
            "build": {
                "text": str(ROOT / "data" / "base"),
                "encoders": {kind: encoders[kind] for kind in kinds},
                "fusion": {
                    "mode": mode,
                    "modality_dropout": given.dropout if kinds == BOTH else 0.0,
                    "auxiliary_loss": 0.0 if mode == "early" else given.auxiliary_loss,
                },
            },
            "max_steps": given.steps,
            "batch_rows": given.batch_rows,
            "learning_rate": given.rate,
            "save_every": 10_000,
        },
        "eval": {"split": given.held_out, "compare": ["base"], "max_new_tokens": 2, "batch_rows": 128},
    }


def children_seconds() -> float:
    """Returns the processor time of all processes that ended."""
    times = resource.getrusage(resource.RUSAGE_CHILDREN)
    return times.ru_utime + times.ru_stime


def mmtune(*words: str) -> float:
    """Runs a command offline; returns its seconds of processor time."""
    before = children_seconds()
    subprocess.run([sys.executable, "-m", "mmtune", *words, "--offline", "--quiet"], check=True, cwd=ROOT)
    return children_seconds() - before


def nats(question: str, recipe: dict, folder: Path) -> float:
    """Returns what a base that was made loses per held-out answer of one question, its end included."""
    run_dir = Path(recipe["run_dir"])
    asked = [row for row in recipe["sources"] if row["id"] == question and row["split"] == recipe["eval"]["split"]]
    alone = {name: recipe[name] for name in ("seed", "eval")} | {"run_dir": f"{run_dir}_{question}", "sources": asked}
    path = folder / f"{run_dir.name}_{question}.yaml"
    path.write_text(json.dumps(alone | {"model": {"path": str(run_dir / "base")}}), "utf-8")
    for command in ("build-data", "eval"):
        mmtune(command, str(path))
    found = json.loads(Path(alone["run_dir"], "report", "metrics.json").read_text("utf-8"))["perplexity"]
    return math.log(found["models"]["base"]["value"]) * found["tokens"] / found["n"]


def run(name: str, seed: int, given: argparse.Namespace, data: Path, folder: Path) -> tuple[dict, Right]:
    """Trains one model; returns its figures, and which answers of each question are right, by row."""
    run_dir = folder / f"{name.replace(' ', '_')}_{seed}"
    path, recipe = folder / f"{run_dir.name}.yaml", recipe_of(name, seed, given, data, run_dir)
    path.write_text(json.dumps(recipe), "utf-8")
    seconds = mmtune("run", str(path))
    right: Right = {}
    for line in (run_dir / "report" / "predictions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        right.setdefault(row["source"], {})[row["id"].partition("/")[2]] = row["scores"]["exact_match"]
    found = {question: round(sum(own.values()) / len(own), 1) for question, own in right.items()}
    if "xor" in right:
        found["xor_nats"] = round(nats("xor", recipe, folder), 3)
    return {"model": name, "seed": seed, **found, "processor_seconds": round(seconds)}, right


def compared(question: str, first: str, second: str, rights: dict[str, list[Right]]) -> dict:
    """Returns the first model's right answers less the second's, in 100, over all seeds; rows are drawn anew."""
    sides = [[own[question] for own in rights[name]] for name in (first, second)]
    names = [name for own in sides[0] for name in own]
    values = [[own[name] for own in side for name in side[0]] for side in sides]
    found = paired_difference(values[1], values[0], groups=names)
    numbers = {key: round(getattr(found, key), 1) for key in ("value", "low", "high")}
    return {"question": question, "models": [first, second], **numbers, "p": round(found.p, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with recordings/<digit>_<speaker>_<take>.wav")
    parser.add_argument("--speaker", help="held out of training; without it takes 0 to 4 of all are")
    parser.add_argument("--held-out", choices=("test", "val"), default="test", help="val: to choose settings by")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--questions", default=",".join(SHARES))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--dropout", type=float, default=0.0, help="chance of a medium to be hidden in a training step")
    parser.add_argument("--auxiliary-loss", type=float, default=0.5, help="of late and hybrid fusion")
    parser.add_argument("--train-rows", type=int, default=3000, help="of xor")
    parser.add_argument("--test-rows", type=int, default=400, help="of each question")
    parser.add_argument("--picture-noise", type=float, default=0.9)
    parser.add_argument("--sound-noise", type=float, default=0.7)
    parser.add_argument("--out", type=Path, help="where the runs stay; left out: nowhere")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        write_data(given, data)
        rights: dict[str, list[Right]] = {name: [] for name in given.models.split(",")}
        for seed in given.seeds.split(","):
            for name, known in rights.items():
                figures, right = run(name, int(seed), given, data, folder)
                known.append(right)
                print(json.dumps(figures), flush=True)
        for question, first, second in COMPARED:
            if question.partition("_")[0] in given.questions.split(",") and {first, second} <= rights.keys():
                print(json.dumps(compared(question, first, second, rights)), flush=True)


if __name__ == "__main__":
    main()

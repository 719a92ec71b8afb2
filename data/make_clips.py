"""Write data/clips: short silent videos of handwritten digits that move or follow each other, with questions.

The digits are the scans of ``make_scenes.py``, of the same disjoint splits; how they move is made here. Where a
digit is in one frame, its time unknown, tells the way it moves no better than every second time, and one frame
shows the digit that comes after or before another no more often. Run from anywhere::

    python data/make_clips.py            # writes data/clips, under a minute

The same seed gives the same frames and questions; another build of the encoder may pack them into other bytes. Needs
scikit-learn, NumPy, Pillow and PyAV.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

HERE = Path(__file__).parent
SEED = 20261127
CLIPS = {"train": 480, "val": 48, "test": 180}
FIRST_CLIP = {"train": 1, "val": 10_001, "test": 20_001}
FRAMES = 9
FRAMES_PER_SECOND = 6
# Digits of one place in the clip stand for this many frames each.
DIGITS_IN_A_ROW = 3
WAYS = {
    "right": (("top left", "top right"), ("bottom left", "bottom right")),
    "left": (("top right", "top left"), ("bottom right", "bottom left")),
    "down": (("top left", "bottom left"), ("top right", "bottom right")),
    "up": (("bottom left", "top left"), ("bottom right", "top right")),
}
ENCODER = {"crf": "16", "preset": "veryslow", "threads": "1"}


@dataclass(frozen=True)
class Clip:
    """One digit that moves between two corners (``way`` says how), or three that follow each other in one."""

    name: str
    way: str
    digits: tuple[int, ...]
    scans: tuple[int, ...]
    color: str
    background: str
    corners: tuple[str, str]


def load_scenes_script() -> ModuleType:
    """``make_scenes.py`` beside this file as a module."""
    spec = importlib.util.spec_from_file_location("make_scenes", HERE / "make_scenes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_scenes"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def draw_clips(split: str, pools: dict[int, list[int]], scenes: ModuleType) -> list[Clip]:
    """The clips of a split: every second moves, the ways in turn; the others are three different digits."""
    rng = random.Random(f"{SEED}/clips/{split}")
    clips = []
    for place in range(CLIPS[split]):
        moves = place % 2 == 0
        way = list(WAYS)[place // 2 % len(WAYS)] if moves else ""
        digits = tuple(rng.sample(range(10), 1 if moves else DIGITS_IN_A_ROW))
        corner = rng.choice(list(scenes.CORNERS))
        clips.append(
            Clip(
                f"{FIRST_CLIP[split] + place:06d}.mp4",
                way,
                digits,
                tuple(rng.choice(pools[digit]) for digit in digits),
                rng.choice(list(scenes.INK)),
                rng.choice(list(scenes.PAPER)),
                rng.choice(WAYS[way]) if moves else (corner, corner),
            )
        )
    return clips


def frames_of(clip: Clip, scans: np.ndarray, scenes: ModuleType) -> Iterator[np.ndarray]:
    """The frames of a clip, each ``(48, 48, 3)`` of uint8."""
    start, end = (np.array(scenes.CORNERS[corner]) for corner in clip.corners)
    for at in range(FRAMES):
        left, top = (start + (end - start) * at / (FRAMES - 1)).round().astype(int)
        scan = clip.scans[at * len(clip.scans) // FRAMES]
        pen = np.kron(scans[scan], np.ones((scenes.DIGIT_PX // 8, scenes.DIGIT_PX // 8)))[..., None]
        canvas = np.empty((scenes.CANVAS_PX, scenes.CANVAS_PX, 3))
        canvas[:] = scenes.PAPER[clip.background]
        window = canvas[top : top + scenes.DIGIT_PX, left : left + scenes.DIGIT_PX]
        window[:] = window * (1 - pen) + np.array(scenes.INK[clip.color]) * pen
        yield canvas.round().astype(np.uint8)


def questions_of(rng: random.Random, clip: Clip) -> list[tuple[str, str, str]]:
    """Kind, question and answer of all that is asked of a clip."""
    values = [str(digit) for digit in clip.digits]
    if clip.way:
        way = rng.choice(("Which way does the digit move?", "Which way does it move, left, right, up or down?"))
        return [("way", way, clip.way), ("moving digit", "Which digit moves?", values[0])]
    first, second, third = values
    after = rng.choice(((first, second), (second, third)))
    before = rng.choice(((second, first), (third, second)))
    return [
        ("first", "Which digit comes first?", first),
        ("last", "Which digit comes last?", third),
        ("after", f"Which digit comes after the {after[0]}?", after[1]),
        ("before", f"Which digit comes before the {before[0]}?", before[1]),
        ("list", "Which digits are shown, one after another?", " ".join(values)),
    ]


def rows_of(split: str, clips: Sequence[Clip]) -> Iterator[dict[str, object]]:
    """A row per question, with what was shown."""
    rng = random.Random(f"{SEED}/questions/{split}")
    for clip in clips:
        shown = {"way": clip.way, "digits": clip.digits, "scans": clip.scans, "corners": clip.corners}
        for kind, question, answer in questions_of(rng, clip):
            key = {"id": f"{clip.name}/{kind}", "question_type": kind}
            yield {**key, "question": question, "answer": answer, "video": clip.name, "shown": shown}


def write_clip(path: Path, frames: Sequence[np.ndarray]) -> None:
    """An H.264 video in an MP4 file, without sound."""
    import av

    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=ENCODER)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    """Write every split below the folder given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "clips")
    out: Path = parser.parse_args().out
    scenes = load_scenes_script()
    scans, classes = scenes.load_scans()
    pools = scenes.split_scans(classes)
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    for split in CLIPS:
        folder = out / split
        folder.mkdir(exist_ok=True)
        clips = draw_clips(split, pools[split], scenes)
        for clip in clips:
            write_clip(folder / clip.name, list(frames_of(clip, scans, scenes)))
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows_of(split, clips))
        (out / "annotations" / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()

"""Options scored through tries against one row per (question, option), side by side: answers per second.

    python tests/bench/bench_options.py                     # five questions per 224-px image, five options each
    python tests/bench/bench_options.py --images 0 --prompt 200    # text alone, rows under one long instruction
    python tests/bench/bench_options.py --model data/base   # another model folder

The model is the 16 M-parameter LLaVA of ``bench_trl.py`` with random weights, fp32. The other side is
``answer_losses``, which runs every (question, option) whole in batches of ``--rows``; media are decoded once per
batch on both. Sides take turns, so a busy machine slows both alike; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_trl import WORDS, make_model

from mmtune.encoding.collate import Collator
from mmtune.encoding.processor import load_processor
from mmtune.encoding.render import Renderer
from mmtune.evaluation.generation import answer_losses
from mmtune.evaluation.options import score_words
from mmtune.evaluation.ranking import Question
from mmtune.evaluation.scoring import Calls, RowScorer
from mmtune.models.load import load_model
from mmtune.records import Medium, Message, TextPart


def make_questions(folder: Path, images: int, questions: int, options: int, prompt: int) -> list[Question]:
    """Returns questions of random words, ``questions`` per picture, or as many of text alone under one instruction."""
    from PIL import Image

    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    instruction, out = words(prompt), []
    for number in range(max(images, 1)):
        shown: tuple[Any, ...] = ()
        if images:
            noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((224, 224)).save(folder / f"{number}.jpg")
            shown = (Medium("image", f"{number}.jpg", width=224, height=224),)
        for _ in range(questions):
            asked = Message("user", (*shown, TextPart(f"{instruction} {words(10)}".strip())))
            names = tuple(dict.fromkeys(words(2) for _ in range(options)))
            out.append(Question(len(out), (asked,), "", names, tuple(range(len(names)))))
    return out


def main() -> None:
    """Runs the rounds and prints one line per side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--questions", type=int, default=5, help="per image, or in all without images")
    parser.add_argument("--options", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=0, help="words of an instruction before every question")
    parser.add_argument("--rows", type=int, default=16, help="rows per batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-options-") as name:
        folder = Path(name)
        if asked.model is None:
            make_model(folder / "model", text_only=not asked.images)
        path = str(asked.model or folder / "model")
        processor, model = load_processor(path), load_model(path)
        encode = Renderer(processor).encode
        questions = make_questions(folder, asked.images, asked.questions, asked.options, asked.prompt)
        pairs = [(question, at) for question in questions for at in range(len(question.words))]

        def shared() -> tuple[np.ndarray, Calls]:
            # A scorer of its own each time: its check of real rows is part of the cost.
            scorer = RowScorer(model, Collator(processor, media_root=folder), batch_rows=asked.rows, note=print)
            return score_words(scorer, encode, pairs), scorer.calls

        def apart() -> tuple[np.ndarray, Calls]:
            rows = [encode(question.conversation(at), "") for question, at in pairs]
            sizes = [row.input_ids.size for row in rows]
            nll, _ = answer_losses(
                model,
                lambda chosen: [rows[at] for at in chosen],
                Collator(processor, media_root=folder),
                sizes=sizes,
                batch_rows=asked.rows,
            )
            return -nll, Calls(len(rows), -(-len(rows) // asked.rows), sum(sizes), sum(sizes))

        report(run(shared, asked.rounds, apart), len(pairs))


Side = Callable[[], tuple[np.ndarray, Calls]]


def run(ours: Side, rounds: int, theirs: Side) -> list[dict[str, Any]]:
    """Returns seconds, scores and calls of both sides, in turns."""
    found = []
    for _ in range(rounds):
        one: dict[str, Any] = {}
        for name, side in (("tries", ours), ("rows", theirs)):
            began = time.perf_counter()
            scores, calls = side()
            one[name] = (time.perf_counter() - began, scores, calls)
        found.append(one)
    return found


def report(found: list[dict[str, Any]], count: int) -> None:
    """Prints a line per side, the ratio and the largest difference."""
    for name in ("tries", "rows"):
        seconds = statistics.median(one[name][0] for one in found)
        calls = found[0][name][2]
        print(f"{name:6s} {count / seconds:8.1f} answers/s, {calls.passes:4d} passes, {calls.tokens:7d} tokens")
    ratio = statistics.median(one["rows"][0] / one["tries"][0] for one in found)
    off = max(float(np.abs(one["tries"][1] - one["rows"][1]).max()) for one in found)
    print(f"{ratio:.2f} x; log-probabilities differ by {off:.1e} at most")


if __name__ == "__main__":
    main()

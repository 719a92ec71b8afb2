"""Write what the bundled omni base is trained from: the joined parts, and its lessons.

``runs/omni/start`` joins the bundled base (its vision tower, projector and language model, with their weights) and a
fresh log-mel sound encoder into one composite model. ``runs/omni/lessons.jsonl`` asks several questions about one
sound, one clip, a picture with a sound, or a scene that the base knows already, so that it is not forgotten. All
questions and answers are those of the annotation files of the train splits; only their arrangement is made here, and
which picture goes with which sound. Run from anywhere::

    python data/make_omni.py
    mmtune run recipes/omni.yaml

The same bundled data give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
RATE_HZ = 8000
WINDOW_SAMPLES, HOP_SAMPLES, MEL_BINS = 200, 80, 40
SOUND_WIDTH = 96
LESSONS = {"sound": 4200, "match": 2400, "clip": 3600, "scene": 2400}
TURNS = 4
MATCH = "Is the digit in the picture the one that is said?"
READ_PICTURE = "What digit is this?"

Turn = tuple[str, str]
Part = dict[str, str]


def script(name: str) -> ModuleType:
    """Another script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(kind: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of ``sounds`` or ``clips`` in the train split, by their own medium."""
    medium = {"sounds": "audio", "clips": "video"}[kind]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(HERE / kind / "annotations" / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            found[row[medium]].append(row)
    return found


def pictures_by_digit() -> dict[str, list[str]]:
    """Train pictures that show one digit alone, by that digit."""
    document = json.loads((HERE / "scenes" / "annotations" / "captions_train.json").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = defaultdict(list)
    for image in document["images"]:
        digits = image["scene"]["digits"]
        if len(digits) == 1:
            found[str(digits[0]["digit"])].append(image["file_name"])
    return found


def conversation(identifier: str, media: list[Part], turns: list[Turn]) -> dict[str, object]:
    """One conversation in the `messages` form; the media stand in its first turn."""
    messages = []
    for place, (question, answer) in enumerate(turns):
        content = [*(media if place == 0 else []), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": identifier, "messages": messages}


def sound_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A sound alone: word, digit and voice in any order."""
    rows = rows_of("sounds")
    for number in range(LESSONS["sound"]):
        name = draw.choice(list(rows))
        turns = [(row["question"], row["answer"]) for row in rows[name] if row["question_type"] != "match"]
        draw.shuffle(turns)
        yield conversation(f"sound-{number}", [{"type": "audio", "path": name}], turns)


def match_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A picture and a sound; in half of the lessons both are read before they are compared."""
    rows, pictures = rows_of("sounds"), pictures_by_digit()
    for number in range(LESSONS["match"]):
        name = draw.choice(list(rows))
        (heard,) = [(row["question"], row["answer"]) for row in rows[name] if row["question_type"] == "digit"]
        same = draw.random() < 0.5
        shown = heard[1] if same else draw.choice([digit for digit in sorted(pictures) if digit != heard[1]])
        media = [{"type": "image", "path": draw.choice(pictures[shown])}, {"type": "audio", "path": name}]
        verdict = (MATCH, "yes" if same else "no")
        read_first = [(READ_PICTURE, shown), heard]
        draw.shuffle(read_first)
        yield conversation(f"match-{number}", media, [*read_first, verdict] if number % 2 else [verdict, *read_first])


def clip_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A clip: several of its questions in any order."""
    rows = rows_of("clips")
    for number in range(LESSONS["clip"]):
        name = draw.choice(list(rows))
        turns = [(row["question"], row["answer"]) for row in rows[name]]
        chosen = draw.sample(turns, min(TURNS, len(turns)))
        yield conversation(f"clip-{number}", [{"type": "video", "path": name}], chosen)


def scene_lessons(draw: random.Random) -> Iterator[dict[str, object]]:
    """A scene and questions that the base was trained on."""
    dialogues = script("make_dialogues")
    known = dialogues.questions_by_image("train")
    for number in range(LESSONS["scene"]):
        image = draw.choice(list(known))
        asked = [turn for turn in known[image] if turn[0] != dialogues.CAPTION_PROMPT]
        chosen = draw.sample(asked, min(TURNS, len(asked)))
        # A caption would give the other answers away, so it comes last.
        captions = [turn for turn in known[image] if turn[0] == dialogues.CAPTION_PROMPT]
        chosen += draw.sample(captions, number % 2)
        yield conversation(f"scene-{number}", [{"type": "image", "path": f"{image:012d}.png"}], chosen)


def write_lessons(path: Path) -> None:
    """Write all lessons in an order of their own."""
    draw = random.Random(0)
    lessons = [lesson for kind in (sound_lessons, match_lessons, clip_lessons, scene_lessons) for lesson in kind(draw)]
    draw.shuffle(lessons)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons), encoding="utf-8")


def join_parts() -> tuple[Any, Any]:
    """The composite model with the base's weights and a fresh sound encoder (seed 0), and its processor."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mmtune.models.composite.assemble import assemble
    from mmtune.models.encoders import LogMelConfig

    base = AutoModelForImageTextToText.from_pretrained(HERE / "base", dtype=torch.float32)
    make_base = script("make_base")
    tokenizer = make_base.make_tokenizer()
    reader = make_base.make_processor(tokenizer)
    sounds = LogMelConfig(
        hidden_size=SOUND_WIDTH,
        intermediate_size=2 * SOUND_WIDTH,
        num_hidden_layers=3,
        num_mel_bins=MEL_BINS,
        sampling_rate=RATE_HZ,
        n_fft=WINDOW_SAMPLES,
        hop_length=HOP_SAMPLES,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    tokenizer.chat_template = make_base.CHAT_TEMPLATE.replace(
        "{%- elif part.text is defined",
        "{%- elif part.type == 'audio' -%}{{ '<audio>' }}\n{%- elif part.text is defined",
    )
    model, processor = assemble(
        base.config.text_config,
        encoders={"image": base.config.vision_config, "audio": sounds},
        tokenizer=tokenizer,
        preprocessors={"image": reader.image_processor},
        vision_feature_layer=base.config.vision_feature_layer,
    )
    taught, own = base.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, value in taught.items():
            # The embeddings have one row more, that of <audio>; it starts as the mean of the others.
            own[name][: len(value)] = value
            own[name][len(value) :] = value.mean(0)
    return model, processor


def main() -> None:
    """Write the start and the lessons below the folder given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "omni")
    out: Path = parser.parse_args().out
    write_lessons(out / "lessons.jsonl")
    model, processor = join_parts()
    model.save_pretrained(out / "start")
    processor.save_pretrained(out / "start")


if __name__ == "__main__":
    main()

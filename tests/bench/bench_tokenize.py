"""tokenize at scale: rows per second, and the memory of every process.

    python tests/bench/bench_tokenize.py 20000 200000

Fabricates instructions/ of VQA shape (640x480 images with five short questions each, media
known by header only) and a tiny Qwen2-VL processor in a temporary folder, runs the stage with
two processes and samples the memory of the process tree every quarter of a second.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

QUESTIONS = [
    "What colour is the {0}?", "Is there a {0} in the picture?", "How many {0}s are there?",
    "Where is the {0} standing?", "What is the {0} doing next to the {1}?",
]  # fmt: skip
THINGS = ["cat", "dog", "bus", "man", "woman", "train", "kite", "horse", "pizza", "clock", "bench", "umbrella"]
ANSWERS = ["yes", "no", "2", "red", "on the left", "playing frisbee"]


def write_model(folder: Path) -> None:
    """Writes a small byte-level tokenizer and a Qwen2-VL image processor."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor

    core = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    text = [question.format(a, b) for question in QUESTIONS for a in THINGS for b in THINGS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet))
    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    core.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))


def write_instructions(run_dir: Path, rows: int) -> None:
    """Writes instructions/train of VQA shape."""
    from mmtune.prompts.schema import example_to_row, instructions_schema
    from mmtune.records import Example, Medium, Message, TextPart
    from mmtune.storage import SplitWriter, finish_split, open_stage

    staging = open_stage(run_dir / "instructions", stage="build-data", config={"bench": rows})
    assert staging is not None
    with staging:
        writer = SplitWriter(staging.path / "train" / "shard-00000.arrow", instructions_schema())
        for number in range(rows):
            picture = number // 5
            path = f"train2014/COCO_train2014_{picture:012d}.jpg"
            medium = Medium("image", path, size_bytes=150_000, width=640, height=480, frames=1)
            things = (THINGS[picture % 12], THINGS[number % 12])
            # Every question is another text, so that no cache of texts flatters the figure.
            question = f"{QUESTIONS[number % 5].format(*things)} ({number})"
            answer = ANSWERS[number % 6]
            messages = (
                Message("user", (medium, TextPart(f"{question} Answer with one word or phrase."))),
                Message("assistant", (TextPart(answer),)),
            )
            example = Example(
                f"vqa/{number}",
                "vqa",
                "vqa",
                "train",
                messages,
                (answer,) * 10,
                "vqa_accuracy",
                group=path,
                template_id="vqa/0",
                metadata={"answer_type": "other", "question_type": "what"},
            )
            writer.write(example_to_row(example))
        count = writer.close()
        finish_split(staging.path / "train", instructions_schema())
        staging.publish(rows={"train": count}, facts={"media_root": str(run_dir)})


class Memory(threading.Thread):
    """Samples memory and processor time of this process and its children until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.seconds: dict[int, float] = {}
        self.done = threading.Event()

    def run(self) -> None:
        import psutil

        own = psutil.Process()
        before = sum(own.cpu_times()[:2])
        while not self.done.wait(0.25):
            # Pages that processes share count once in Pss_Anon.
            total = {"Pss_Anon": 0, "RssAnon": 0, "VmRSS": 0}
            worst = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    used = sum(process.cpu_times()[:2])
                    self.seconds[process.pid] = used - (before if process.pid == own.pid else 0.0)
                    folder = Path(f"/proc/{process.pid}")
                    lines = [
                        line for name in ("status", "smaps_rollup") for line in (folder / name).read_text().splitlines()
                    ]
                except (OSError, psutil.Error):
                    continue
                values = {
                    line.split(":")[0]: int(line.split()[1])
                    for line in lines
                    if line.startswith(("RssAnon", "VmRSS", "Pss_Anon"))
                }
                for name in total:
                    total[name] += values.get(name, 0)
                worst = max(worst, values.get("VmRSS", 0))
            for name, value in {**total, "largest process VmRSS": worst}.items():
                self.peaks[name] = max(self.peaks.get(name, 0), value)


def measure(folder: Path, rows: int, workers: int) -> dict[str, Any]:
    """Runs the stage once and returns its figures."""
    from mmtune.recipe import Model, Recipe, Tokenize
    from mmtune.stages import tokenize as stage
    from mmtune.talk import Talk

    run_dir = folder / f"run-{rows}"
    write_instructions(run_dir, rows)
    recipe = Recipe(run_dir=run_dir, model=Model(path=str(folder / "model")), tokenize=Tokenize(workers=workers))
    memory = Memory()
    memory.start()
    started = time.monotonic()
    stage._INLINE_UNITS = 0
    result = stage.tokenize(recipe, offline=True, console=Talk())
    seconds = time.monotonic() - started
    memory.done.set()
    memory.join()
    manifest = json.loads((run_dir / "tokens" / "manifest.json").read_text())
    encoding = manifest["timings"]["encode_seconds"]
    shutil.rmtree(run_dir)
    return {
        "rows": rows,
        "workers": workers,
        "seconds, whole stage": round(seconds, 1),
        "rows/s, whole stage": round(rows / seconds),
        "rows/s, encoding (start of processes included)": round(rows / encoding),
        "rows per second of processor time, all processes": round(rows / sum(memory.seconds.values())),
        "rows out": sum(result["rows"].values()),
        **{f"peak {name} MiB": round(value / 1024) for name, value in memory.peaks.items()},
    }


def main() -> None:
    """Measures every size given on the command line."""
    sizes = [int(text) for text in sys.argv[1:]] or [20_000, 200_000]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        write_model(folder / "model")
        for rows in sizes:
            print(json.dumps(measure(folder, rows, 2), indent=1), flush=True)


if __name__ == "__main__":
    main()

"""Training against TRL's SFTTrainer, side by side: rows per second and peak memory.

    python tests/bench/bench_trl.py                       # all workloads on the CPU
    python tests/bench/bench_trl.py shared one --rounds 5
    python tests/bench/bench_trl.py easy --data DIR       # easy_vqa's real rows, DIR holds train/questions.json
    python tests/bench/bench_trl.py cached --beside 1     # with other work on the cores
    python tests/bench/bench_trl.py shared --python PEER/bin/python   # TRL in an environment of its own

Both sides get the same model folder (random weights), the same rows in files, the same LoRA, type
and number of rows per step; each run is a process of its own that trains for some steps, and the
rows per second are those after the first steps. Sides take turns, so a busy machine slows both alike;
the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARM, STEPS = 10, 40
WORDS = (
    *("the", "left", "right", "digit", "colour", "of", "which", "how", "many", "is", "in", "picture"),
    *("red", "blue", "green", "seven", "three", "large", "small"),
)
WORKLOADS = {
    "shared": "five questions per 224-px image, five rows per step",
    "cached": "the same from the second epoch on, the frozen tower's features kept",
    "one": "one question per image, five rows per step",
    "text": "text rows of 10 to 120 words, packed",
    "easy": "easy_vqa's real rows, 9.6 per image",
}
LORA = {"r": 8, "alpha": 16}


def make_model(folder: Path, text_only: bool) -> None:
    """Writes a LLaVA of 16 M parameters for 224-px images, or its language model alone."""
    import importlib.util

    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    spec = importlib.util.spec_from_file_location("make_base", ROOT / "data" / "make_base.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    maker.IMAGE_PX, maker.PATCH_PX = 224, 16
    tokenizer = maker.make_tokenizer()
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=4096, hidden_size=320, intermediate_size=864, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    if text_only:
        tokenizer.chat_template = maker.CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        LlamaForCausalLM(text).save_pretrained(folder)
        return
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=16,
    )  # fmt: skip
    processor = maker.make_processor(tokenizer)
    processor.save_pretrained(folder)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def make_rows(folder: Path, workload: str, data: Path | None) -> list[dict[str, Any]]:
    """Returns question, answer and image of every row, and writes the pictures."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(count))

    if workload == "easy":
        assert data is not None, "give --data, the folder of easy_vqa"
        rows = json.loads((data / "train" / "questions.json").read_text("utf-8"))
        (folder / "images").symlink_to((data / "train" / "images").resolve())
        return [{"question": q, "answer": a, "image": f"{i}.png"} for q, a, i in rows if i < 150]
    if workload == "text":
        return [{"question": words(rng.randint(5, 60)), "answer": words(rng.randint(5, 60))} for _ in range(2000)]
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    per_image = 1 if workload == "one" else 5
    rows = []
    for number in range(200 // per_image):
        path = folder / "images" / f"{number}.jpg"
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((224, 224)).save(path)
        rows += [{"question": words(10), "answer": words(2), "image": path.name} for _ in range(per_image)]
    return rows


def settings_of(workload: str, per_step: int) -> dict[str, Any]:
    """Returns mmtune's recipe sections."""
    finetune = {
        "lora": LORA,
        "max_steps": STEPS,
        "learning_rate": 1e-4,
        "batch_rows": None if workload == "text" else per_step,
        "batch_tokens": 1024 if workload == "text" else 65536,
        "log_every": WARM,
        "precision": "fp32",
        "features": {"use": "on" if workload == "cached" else "off"},
    }
    return {"build": {"templates": "first"}, "tokenize": {"max_length": 1024, "workers": 1}, "finetune": finetune}


def run_mmtune(folder: Path, workload: str, per_step: int) -> dict[str, float]:
    """Trains with mmtune and returns rows per second and peak memory."""
    columns = {"question": "question", "answer": "answer"} | ({} if workload == "text" else {"image": "image"})
    source = {"id": "rows", "reader": "table", "path": str(folder / "rows.jsonl"), "columns": columns}
    source["template"] = "vqa_plain"
    if workload != "text":
        source["images"] = str(folder / "images")
    recipe = {"run_dir": str(folder / "run"), "model": {"path": str(folder / "model")}, "sources": [source]}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe | settings_of(workload, per_step)))
    for stage in ("build-data", "tokenize"):
        subprocess.run([sys.executable, "-m", "mmtune", stage, str(path), "-q"], check=True, cwd=ROOT)
    command = [sys.executable, "-m", "mmtune", "finetune", str(path), "--force", "-q"]
    peak = peak_of(command)
    lines = [json.loads(line) for line in (folder / "run" / "adapter" / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["rows_per_second"] for line in lines if line.get("step", 0) > WARM and "loss" in line]
    return {"rows/s": statistics.harmonic_mean(speeds), "peak MiB": peak}


def run_trl(folder: Path, workload: str, per_step: int, python: str) -> dict[str, float]:
    """Trains with TRL and returns rows per second and peak memory."""
    command = [python, __file__, "--trl", str(folder), workload, str(per_step)]
    peak = peak_of(command)
    return {"rows/s": json.loads((folder / "trl.json").read_text())["rows/s"], "peak MiB": peak}


def peak_of(command: list[str]) -> float:
    """Runs a command and returns its peak resident memory in MiB."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    return usage.ru_maxrss / 1024


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps as many cores busy within this context."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def trl_side(folder: Path, workload: str, per_step: int) -> None:
    """The other side, in a process of its own."""
    import time

    from datasets import Dataset, Image, Sequence
    from peft import LoraConfig
    from transformers import AutoProcessor, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    text = workload == "text"

    def part(value: str) -> Any:
        return value if text else [{"type": "text", "text": value}]

    image = [] if text else [{"type": "image", "text": ""}]
    table = {
        "prompt": [[{"role": "user", "content": part(r["question"]) if text else image + part(r["question"])}]
                   for r in rows],
        "completion": [[{"role": "assistant", "content": part(r["answer"])}] for r in rows],
    }  # fmt: skip
    if not text:
        table["images"] = [[str(folder / "images" / r["image"])] for r in rows]
    dataset = Dataset.from_dict(table)
    if not text:
        dataset = dataset.cast_column("images", Sequence(Image()))

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    more = {"packing": True, "max_length": 1024} if text else {"max_length": None}
    args = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=1 if text else per_step,
        learning_rate=1e-4, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_steps=WARM, model_init_kwargs={"dtype": "float32"}, **more,
    )  # fmt: skip
    auto = AutoTokenizer if text else AutoProcessor
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=args,
        train_dataset=dataset,
        processing_class=auto.from_pretrained(folder / "model"),
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], lora_dropout=0.0,
            target_modules=r".*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj" if text else
            r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    seconds = ends[-1] - ends[WARM - 1]
    if text:
        # A packed row holds many: count those of the tokens that were trained.
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        per_row = sum(lengths) / len(rows)
        rate = sum(lengths) / len(lengths) / per_row * (STEPS - WARM) / seconds
    else:
        rate = per_step * (STEPS - WARM) / seconds
    (folder / "trl.json").write_text(json.dumps({"rows/s": rate}))


def main() -> None:
    """Runs the rounds and prints one line per workload."""
    if "--trl" in sys.argv:
        at = sys.argv.index("--trl")
        folder, workload, per_step = sys.argv[at + 1 : at + 4]
        trl_side(Path(folder), workload, int(per_step))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["shared", "cached", "one", "text"], choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=5, help="rows per step")
    parser.add_argument("--data", type=Path, help="the folder of easy_vqa")
    parser.add_argument("--beside", type=int, default=0, help="processes that keep a core busy meanwhile")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has TRL")
    asked = parser.parse_args()
    for workload in asked.workloads:
        per_step = 10 if workload == "easy" else asked.rows
        with tempfile.TemporaryDirectory(prefix="bench-trl-") as name:
            folder = Path(name)
            make_model(folder / "model", workload == "text")
            rows = make_rows(folder, workload, asked.data)
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            ours, theirs = [], []
            with busy_processes(asked.beside):
                for _ in range(asked.rounds):
                    ours.append(run_mmtune(folder, workload, per_step))
                    theirs.append(run_trl(folder, workload, per_step, asked.python))
            ratio = statistics.median(a["rows/s"] / b["rows/s"] for a, b in zip(ours, theirs, strict=True))
            speeds = [statistics.median(found["rows/s"] for found in side) for side in (ours, theirs)]
            peaks = [statistics.median(found["peak MiB"] for found in side) for side in (ours, theirs)]
            print(
                f"{workload}: {WORKLOADS[workload]}: mmtune {speeds[0]:.1f} rows/s, TRL {speeds[1]:.1f}:"
                f" {ratio:.2f} x; peak {peaks[0]:.0f} and {peaks[1]:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()

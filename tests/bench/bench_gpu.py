"""Training a Qwen2.5-VL-3B shape on one GPU against TRL's SFTTrainer.

    python tests/bench/bench_gpu.py                       # a CUDA machine with TRL; about 10 GB in $TMPDIR
    python tests/bench/bench_gpu.py --only 'mmtune-auto-off|trl-sdpa-off-40'
    python tests/bench/bench_gpu.py --tiny --device cpu   # the same script over a toy, to see that it runs

Random weights made on the device, bf16, five questions per 448-px image (256 tokens), LoRA r=16 on the
language model. Both sides get the same model folder, rows, LoRA and rows per step, and each run is a
process of its own; mmtune runs its real stages. TRL takes turns with and without activation checkpointing,
with micro batches of all, a half and a quarter of a step's rows, with SDPA and, where flash-attn is
installed, FlashAttention 2, with Liger's kernels where installed (packing and padding-free batches it
refuses for images). A setting that fails is printed with its error. The ratio is the best of each side. MFU
counts the language model's weights (PaLM, appendix B) over the tokens that a side computes: a tree has
fewer than its rows, so rows/s is what compares.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LORA = {"r": 16, "alpha": 32}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPECIAL = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
QUESTIONS = 5
WORDS = ("what", "colour", "is", "the", "left", "right", "dog", "cat", "how", "many", "people", "red", "two", "street")


class Size(NamedTuple):
    """How large a run is: of the model, the image and the steps, and the tokens of ``bench_flex.py``'s row."""

    tiny: bool
    device: str
    rows: int
    warm: int
    steps: int
    image_px: int
    bin_tokens: int

    @property
    def workers(self) -> int:
        """Processes that make batches ahead of the step."""
        return 0 if self.tiny else 8


def size_of(tiny: bool, device: str, rows: int) -> Size:
    """A toy, or the full size."""
    return Size(tiny, device, rows, *((2, 6, 56, 512) if tiny else (6, 24, 448, 8192)))


class Setting(NamedTuple):
    """How a side runs: its attention, whether activations are computed again, and rows of a micro batch."""

    side: str
    attention: str
    checkpointing: bool
    micro: int

    @property
    def name(self) -> str:
        """Such as ``trl-sdpa-off-40``."""
        return f"{self.side}-{self.attention}-{'on' if self.checkpointing else 'off'}-{self.micro}"


def base_maker() -> Any:
    """The script of the bundled base model, for its tokenizer and its chat template."""
    spec = importlib.util.spec_from_file_location("make_base", ROOT / "data" / "make_base.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


def make_model(folder: Path, size: Size) -> None:
    """Writes processor, config and random weights."""
    import torch
    import transformers as t

    maker = base_maker()
    tokenizer = maker.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [maker.START, *SPECIAL.values()]})
    shown = SPECIAL["start"] + SPECIAL["image"] + SPECIAL["end"]
    tokenizer.chat_template = maker.CHAT_TEMPLATE.replace("'<image>'", repr(shown))
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    for part in (tokenizer, images):
        part.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2_5_VLProcessor"}')
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if size.device == "cuda" else torch.float32)
    with torch.device(size.device):
        model = t.Qwen2_5_VLForConditionalGeneration(model_config(tokenizer, size.tiny))
    model.save_pretrained(folder)


def model_config(tokenizer: Any, tiny: bool) -> Any:
    """The public shape of Qwen2.5-VL-3B, or a toy of the same make."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    if tiny:
        text |= {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 4, "rope_parameters": {**text["rope_parameters"], "mrope_section": [2, 3, 3]}}
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL[name]) for name in ("image", "video")}
    ids |= {f"vision_{name}_token_id": tokenizer.convert_tokens_to_ids(SPECIAL[name]) for name in ("start", "end")}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def make_rows(folder: Path, size: Size) -> None:
    """Writes the pictures and one line per question: enough for every step to see new ones."""
    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    (folder / "images").mkdir()
    rows = []
    for number in range(math.ceil(size.rows * size.steps / QUESTIONS)):
        name = f"{number}.jpg"
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((size.image_px, size.image_px)).save(folder / "images" / name)
        for _ in range(QUESTIONS):
            question, answer = (" ".join(rng.choice(WORDS) for _ in range(count)) for count in (10, 3))
            rows.append({"question": question, "answer": answer, "image": name})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_of(folder: Path, size: Size, setting: Setting) -> Path:
    """Writes mmtune's recipe and returns its path."""
    columns = {name: name for name in ("question", "answer", "image")}
    source = {"id": "rows", "reader": "table", "path": str(folder / "rows.jsonl"), "columns": columns}
    source |= {"template": "vqa_plain", "images": str(folder / "images")}
    finetune = {
        "lora": LORA, "max_steps": size.steps, "batch_rows": setting.micro, "batch_tokens": 1 << 20,
        "log_every": size.warm, "precision": "bf16" if size.device == "cuda" else "fp32", "features": {"use": "off"},
        "accumulate": size.rows // setting.micro, "checkpointing": setting.checkpointing, "workers": size.workers,
    }  # fmt: skip
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "attn": setting.attention},
        "sources": [source],
        "build": {"templates": "first"},
        "tokenize": {"max_length": 4096, "workers": 1},
        "finetune": finetune,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def mmtune_side(folder: Path, size: Size, setting: Setting) -> dict[str, float]:
    """Runs `mmtune finetune` in this process; returns rows, tokens per second and the peak memory in GiB."""
    from mmtune.__main__ import main

    recipe = recipe_of(folder, size, setting)
    sys.argv = ["mmtune", "finetune", str(recipe), "--force", "-q"]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    lines = [json.loads(line) for line in (folder / "run" / "adapter" / "metrics.jsonl").read_text().splitlines()]
    after = [line for line in lines if line.get("step", 0) > size.warm and "loss" in line]
    rates = {
        name: statistics.harmonic_mean(line[f"{name}_per_second"] for line in after) for name in ("rows", "tokens")
    }
    return {"rows": rates["rows"], "tokens": rates["tokens"], "peak": peak_gib(size.device)}


def trl_side(folder: Path, size: Size, setting: Setting) -> dict[str, float]:
    """Runs TRL's trainer in this process; returns what ``mmtune_side`` does."""
    from datasets import Dataset, Image, Sequence
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    shown = {"type": "image", "text": ""}
    table = {
        "prompt": [[{"role": "user", "content": [shown, {"type": "text", "text": r["question"]}]}] for r in rows],
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": r["answer"]}]}] for r in rows],
        "images": [[str(folder / "images" / r["image"])] for r in rows],
    }
    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    cuda = size.device == "cuda"
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            output_dir=str(folder / "trl"), max_steps=size.steps, per_device_train_batch_size=setting.micro,
            gradient_accumulation_steps=size.rows // setting.micro, max_length=None, learning_rate=1e-4,
            use_cpu=not cuda, bf16=cuda, report_to=[], save_strategy="no", logging_steps=size.warm,
            gradient_checkpointing=setting.checkpointing,
            dataloader_num_workers=size.workers, use_liger_kernel=cuda and liger_fits(),
            model_init_kwargs={"dtype": "bfloat16" if cuda else "float32", "attn_implementation": setting.attention},
        ),
        train_dataset=Dataset.from_dict(table).cast_column("images", Sequence(Image())),
        processing_class=processor_of(folder / "model"),
        peft_config=LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=rf".*language_model.*\.({'|'.join(LINEAR)})"
        ),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    rate = size.rows * (size.steps - size.warm) / (ends[-1] - ends[size.warm - 1])
    return {"rows": rate, "tokens": rate * tokens_per_row(folder), "peak": peak_gib(size.device)}


def liger_fits() -> bool:
    """Whether Liger's kernels are installed and can be put into this family: some releases expect another one."""
    try:
        importlib.import_module("liger_kernel.transformers.model.qwen2_5_vl")
    except ImportError:
        return False
    return True


def processor_of(folder: Path) -> Any:
    """The processor by transformers, or by mmtune where torchvision is not installed."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError):
        from mmtune.encoding.processor import load_processor

        return load_processor(str(folder))


def tokens_per_row(folder: Path) -> float:
    """The mean length of a row that stands apart."""
    from mmtune.storage import open_split
    from mmtune.training.data import row_sizes

    return float(row_sizes(open_split(folder / "run" / "tokens" / "train"))[0].tokens.mean())


def peak_gib(device: str) -> float:
    """Most memory of this process: of the GPU, or resident on a CPU."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    import torch

    return torch.cuda.max_memory_allocated() / (1 << 30)


SIDES = {"mmtune": mmtune_side, "trl": trl_side}


def apart(folder: Path, size: Size, python: str, setting: Setting, logs: Path | None) -> dict[str, Any]:
    """Runs a side in a process of its own; returns its numbers, or ``error``."""
    out = folder / "numbers.json"
    out.unlink(missing_ok=True)
    asked = {"folder": str(folder), "tiny": size.tiny, "device": size.device, "rows": size.rows, "setting": setting}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [python, __file__, "--child", json.dumps(asked)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if logs is not None:
        (logs / f"{setting.name}.log").write_text(ended.stdout + ended.stderr)
    if ended.returncode == 0:
        return dict(json.loads(out.read_text()))
    said = [line for line in ended.stderr.splitlines() if line.strip()] or ["no word"]
    return {"error": next((line for line in reversed(said) if "rror" in line), said[-1])[:160]}


def child(asked: dict[str, Any]) -> None:
    """The process of one side."""
    folder, size = Path(asked["folder"]), size_of(asked["tiny"], asked["device"], asked["rows"])
    setting = Setting(*asked["setting"])
    (folder / "numbers.json").write_text(json.dumps(SIDES[setting.side](folder, size, setting)))


def settings_of(size: Size) -> list[Setting]:
    """Returns every run, the likely best of each side first."""
    flash = ["flash_attention_2"] if importlib.util.find_spec("flash_attn") and size.device == "cuda" else []
    found = [("mmtune", "auto", False, 1)]
    found += [("trl", attention, False, 2) for attention in [*flash, "sdpa"]]
    found += [("trl", "sdpa", True, 1), ("mmtune", "sdpa", False, 1), ("mmtune", "auto", True, 1)]
    found += [("trl", "sdpa", False, 4), ("trl", "sdpa", True, 2)]
    return [Setting(side, kernel, again, max(size.rows // part, 1)) for side, kernel, again, part in found]


def flops_of_token(folder: Path) -> float:
    """FLOPs of a token through the language model with its adapters, from the shape alone."""
    import torch

    from mmtune.models.adapter import add_lora
    from mmtune.models.load import load_config, model_class
    from mmtune.training.flops import flops_per_token

    config = load_config(str(folder / "model"))
    with torch.device("meta"):
        return flops_per_token(add_lora(model_class(config)(config), towers=("llm",), targets=None, **LORA))


def show_head(size: Size, folder: Path) -> None:
    """Prints what is measured and the table's head."""
    import torch

    device = torch.cuda.get_device_name() if size.device == "cuda" else "cpu"
    print(
        f"{device}, torch {torch.__version__}, {size.rows} rows per step, {tokens_per_row(folder):.0f} tokens per row"
    )
    print("| side | attention | checkpointing | micro batch | rows/s | tokens/s | MFU | peak GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)


def show_setting(size: Size, folder: Path, setting: Setting, runs: list[dict[str, Any]]) -> float:
    """Prints a row of the table; returns rows per second, 0 where the setting failed."""
    import torch

    from mmtune.training.flops import peak_flops

    start = f"| {setting.side} | {setting.attention} | {'on' if setting.checkpointing else 'off'} | {setting.micro} |"
    wrong = next((run["error"] for run in runs if "error" in run), None)
    if wrong is not None:
        print(f"{start} {wrong} | | | |", flush=True)
        return 0.0
    rows, tokens, memory = (statistics.median(run[name] for run in runs) for name in ("rows", "tokens", "peak"))
    peak = peak_flops(torch.cuda.get_device_name()) if size.device == "cuda" else None
    mfu = f"{tokens * flops_of_token(folder) / peak:.0%}" if peak else "-"
    print(f"{start} {rows:.1f} | {tokens:.0f} | {mfu} | {memory:.2f} |", flush=True)
    return rows


def make(folder: Path, size: Size) -> None:
    """Writes pictures, rows, model and tokens into a folder."""
    make_rows(folder, size)
    make_model(folder / "model", size)
    recipe = str(recipe_of(folder, size, Setting("mmtune", "auto", False, size.rows)))
    for stage in ("build-data", "tokenize"):
        subprocess.run([sys.executable, "-m", "mmtune", stage, recipe, "-q"], check=True, cwd=ROOT)


def main() -> None:
    """Runs every setting and prints the table."""
    if "--child" in sys.argv:
        child(json.loads(sys.argv[sys.argv.index("--child") + 1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a toy model and few steps")
    parser.add_argument("--only", default="", help="a pattern of the settings to run, such as trl-sdpa-off-40")
    parser.add_argument("--rows", type=int, default=0, help="rows per step; default 80, with --tiny 20")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="an existing folder for what each run prints")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has TRL; mmtune's libraries too")
    asked = parser.parse_args()
    size = size_of(asked.tiny, asked.device, asked.rows or (20 if asked.tiny else 80))
    if size.device == "cpu" and not size.tiny:
        parser.error("a CPU is for --tiny alone")
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        folder = Path(name)
        make(folder, size)
        settings = [each for each in settings_of(size) if re.search(asked.only, each.name)]
        found: list[tuple[Setting, list[dict[str, Any]]]] = [(each, []) for each in settings]
        show_head(size, folder)
        best: dict[str, float] = {}
        for number in range(asked.rounds):
            for setting, runs in found:
                python = asked.python if setting.side == "trl" else sys.executable
                runs.append(apart(folder, size, python, setting, asked.logs))
                if number == asked.rounds - 1:
                    rate = show_setting(size, folder, setting, runs)
                    best[setting.side] = max(best.get(setting.side, 0.0), rate)
        if all(best.values()):
            print(f"best of each: {best['mmtune'] / best['trl']:.2f} x rows/s (wanted: 3)", flush=True)


if __name__ == "__main__":
    main()

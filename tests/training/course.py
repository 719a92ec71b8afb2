"""A tiny vision-language model, made-up rows and a run of the loop over them, for the tests beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

IMAGE, VOCABULARY, PATCHES, LENGTH = 3, 40, 4, 12


def tiny_model(**vision: Any) -> Any:
    """A LLaVA of a few thousand weights, the same one each time."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(7)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(**small, vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2)
    tower = CLIPVisionConfig(**{**small, "image_size": 16, "patch_size": 8, "initializer_range": 0.2, **vision})
    own = {"image_token_id": IMAGE, "image_seq_length": PATCHES, "vision_feature_layer": -1}
    config = LlavaConfig(vision_config=tower, text_config=text, **own)
    return LlavaForConditionalGeneration(config)


@dataclass
class Rows:
    """Rows by number: some with a picture, answers of different lengths, all padded to one length."""

    count: int = 12
    pictures: frozenset[int] = frozenset(range(100))
    spoilt: frozenset[int] = frozenset()
    seen: list[int] = field(default_factory=list)

    def targets(self, row: int) -> int:
        return 1 + row % 3

    def batch(self, rows: Any, step: int | None = None) -> dict[str, torch.Tensor]:
        self.seen += [int(row) for row in rows]
        ids, labels, mask, pixels = [], [], [], []
        for row in map(int, rows):
            random = np.random.default_rng(row)
            own = random.integers(4, VOCABULARY, LENGTH)
            if row in self.pictures:
                own[1 : 1 + PATCHES] = IMAGE
                value = random.standard_normal((3, 16, 16))
                pixels.append(torch.tensor(value * (np.nan if row in self.spoilt else 1.0), dtype=torch.float32))
            size = LENGTH - row % 2
            answer = np.where(np.arange(LENGTH) >= size - self.targets(row), own, -100)
            inside = np.arange(LENGTH) < size
            ids.append(np.where(inside, own, 0))
            labels.append(np.where(inside, answer, -100))
            mask.append(inside.astype(np.int64))
        names = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        made = {name: torch.from_numpy(np.stack(value)) for name, value in names.items()}
        return {**made, "pixel_values": torch.stack(pixels)} if pixels else made

    def modalities(self, rows: Any) -> set[str]:
        return {"image"} if any(int(row) in self.pictures for row in rows) else set()

    def ids(self, rows: Any) -> list[str]:
        return [f"row-{int(row)}" for row in rows]


def run(model: Any, rows: Rows, **asked: Any) -> SimpleNamespace:
    """Trains and returns ``outcome``, ``losses`` by step, ``notes``, ``saved`` steps, their
    metrics ``texts`` and ``sums``, and the ``optimizer``."""
    import json

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from mmtune.training.loop import Hooks, LoopSettings, train
    from mmtune.training.optimizer import make_optimizer
    from mmtune.training.plan import Plan, TreeSizes

    options = {"rate": 0.01, "steps": 4, "batch_rows": 4, "accumulate": 1, "precision": "no", "clip": 1.0} | asked
    numbers = np.arange(rows.count)
    sizes = TreeSizes(np.ones_like(numbers), np.full_like(numbers, LENGTH), 1 + numbers % 3, numbers * 0)
    # Accelerate keeps the precision of the first run of a process.
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=options["precision"])
    plan = Plan(
        sizes, 0, 10**6, options["batch_rows"], accelerator.num_processes * options["accumulate"], 1.0, options["steps"]
    )
    optimizer = options.get("optimizer") or make_optimizer(model, rate=options["rate"], weight_decay=0.0, beta2=0.99)
    notes: list[str] = []
    saved: list[int] = []
    texts: dict[int, str] = {}
    kept: dict[int, dict[str, float]] = {}

    def keep(step: int, metrics: str, sums: dict[str, float]) -> None:
        saved.append(step)
        texts[step] = metrics
        kept[step] = sums

    hooks = Hooks(
        batch=rows.batch,
        ids=rows.ids,
        modalities=rows.modalities,
        save=keep,
        last_good=lambda: f"step {saved[-1]}" if saved else "none yet",
        validate=options.get("validate", lambda stopping: None),
        log=lambda row: None,
        note=notes.append,
        advance=lambda steps, note: None,
    )
    settings = LoopSettings(
        seed=0,
        peak_rate=options["rate"],
        schedule="constant",
        warmup=0,
        clip=options["clip"],
        save_every=options.get("save_every", 1000),
        log_every=options.get("log_every", 1),
        eval_every=options.get("eval_every"),
        workers=options.get("workers", 0),
    )
    begun = {"start": options.get("start", 0), "metrics": options.get("metrics", ""), "sums": options.get("sums")}
    outcome = train(model, optimizer, accelerator, plan, settings, hooks, **begun)
    rows = [json.loads(line) for line in outcome.metrics.splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return SimpleNamespace(
        outcome=outcome, losses=losses, notes=notes, saved=saved, texts=texts, sums=kept, optimizer=optimizer, plan=plan
    )

"""Trees against rows, side by side: rows per second of a training step, and their peak memory.

    python tests/bench/bench_tree.py                    # 2 cores: 16 M-parameter LLaVA, LoRA r=8, fp32
    python tests/bench/bench_tree.py --device cuda      # an accelerator: a 3 B Qwen2.5-VL shape, bf16

Five questions per 224-px image, random weights. A step is what the loop does: decode-free batch
making, forward, backward, AdamW. Forms take turns within each round, so a busy machine slows all
alike; the ratio is the median over rounds. Peak memory on a CPU is left out, as one process
holds all forms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtune.encoding.collate import Collator
from mmtune.encoding.render import EncodedRow, MediaSpan
from mmtune.encoding.tree import Tree, build_trees, tree_rows
from mmtune.models.adapter import add_lora
from mmtune.models.attention import use_text_attention
from mmtune.models.mask_rules import mask_rules
from mmtune.models.rope_index import rope_index
from mmtune.records import Medium
from mmtune.training.loss import answer_loss
from mmtune.training.packing import Packing, TreeLengths
from mmtune.training.tree_batch import TreeCollator
from mmtune.training.tree_blocks import BLOCK

QUESTION_TOKENS, ANSWER_TOKENS = 12, 4


class Pixels:
    """Stands for a family's processor and its files: the media are made once, at random."""

    def __init__(self, image: dict[str, torch.Tensor], token: int) -> None:
        self.image, self.token = image, token

    def collator(self) -> Collator:
        made = Collator.__new__(Collator)
        made._left, made._pad, made._types, made._per_row, made._gemma = False, 0, self.typed, False, False
        made._processor = self
        made.media = self.media  # type: ignore[method-assign]
        return made

    @property
    def typed(self) -> bool:
        return "image_grid_thw" in self.image

    def create_mm_token_type_ids(self, ids: list[list[int]]) -> list[list[int]]:
        return (np.asarray(ids) == self.token).astype(int).tolist()

    def media(self, rows: list[EncodedRow], step: int | None = None) -> dict[str, torch.Tensor]:
        count = sum(len(row.media) for row in rows)
        return {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in self.image.items()}


def llava(vocabulary: int = 4096) -> tuple[Any, Pixels, list[int]]:
    """A LLaVA of 16 M parameters: 196 patches of a 224-px image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=224,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=320, intermediate_size=864, num_hidden_layers=6,
        num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    model = LlavaForConditionalGeneration(config)
    return model, Pixels({"pixel_values": torch.randn(1, 3, 224, 224)}, 1), [1] * 196


def qwen2_5_vl() -> tuple[Any, Pixels, list[int]]:
    """The shape of Qwen2.5-VL-3B: 256 tokens of a 448-px image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=151655)
    with torch.device("cuda"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    image = {"pixel_values": torch.randn(1024, 1176), "image_grid_thw": torch.tensor([[1, 32, 32]])}
    return model, Pixels(image, 151655), [151652, *[151655] * 256, 151653]


def make_trees(count: int, questions: int, image: list[int], vocabulary: int) -> list[Tree]:
    """Returns one tree per picture, with questions and answers of random words."""
    generator = np.random.default_rng(0)
    trees = []
    for number in range(count):
        start = [5, 6, 7]
        span = MediaSpan(Medium("image", f"{number}.png", width=224, height=224), len(start), len(image))
        rows = []
        for question in range(questions):
            words = generator.integers(10, vocabulary, QUESTION_TOKENS + ANSWER_TOKENS).astype(np.int32)
            words[0] = 10 + question
            ids = np.concatenate([start, image, words]).astype(np.int32)
            labels = np.where(np.arange(ids.size) >= ids.size - ANSWER_TOKENS, ids, -100).astype(np.int32)
            rows.append(EncodedRow(ids, labels, (span,)))
        trees += build_trees(rows, [f"{number}/{k}" for k in range(questions)], 4096)
    return trees


def whole_logits_loss(model: Any, batch: dict[str, torch.Tensor], rules: Any) -> tuple[torch.Tensor, int]:
    """What a trainer without this module does: a logit for every token."""
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
    bears = labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(logits[bears].float(), labels[:, 1:][bears], reduction="sum")
    return loss, int(bears.sum())


Form = tuple[str, Callable[[list[Tree]], dict[str, torch.Tensor]], Any]


def forms(model: Any, pixels: Pixels, capacity: int, flex: bool) -> list[Form]:
    """Returns name, batch and loss of every way to train the same rows."""
    collate = pixels.collator()
    windows = tuple(mask_rules(model).windows.values()) if flex else ()
    tree_collate = TreeCollator(collate, rope_index(model), BLOCK if flex else 1, windows)

    def apart(trees: list[Tree]) -> dict[str, torch.Tensor]:
        rows = [row for tree in trees for row in tree_rows(tree)]
        return {**collate.text(rows), **collate.media(rows)}

    def together(trees: list[Tree]) -> dict[str, torch.Tensor]:
        costs = np.array([tree.input_ids.size for tree in trees])
        lengths = TreeLengths(costs, costs * 0, np.array([len(tree.example_ids) for tree in trees]))
        packing = Packing(costs, lengths, capacity, 0)
        return tree_collate([[trees[k] for k in members] for members in packing.bins(0)])

    return [
        ("rows, every logit", apart, whole_logits_loss),
        ("rows", apart, answer_loss),
        ("trees", together, answer_loss),
    ]


def step(model: Any, optimizer: Any, form: Form, trees: list[Tree], rules: Any, device: str) -> float:
    """Returns the rows per second of one optimizer step."""
    _, collate, loss_of = form
    began = time.perf_counter()
    batch = {name: value.to(device) for name, value in collate(trees).items()}
    if device == "cuda":
        batch = {name: v.to(torch.bfloat16) if v.is_floating_point() else v for name, v in batch.items()}
    loss, count = loss_of(model, batch, rules)
    (loss / count).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return sum(len(tree.example_ids) for tree in trees) / (time.perf_counter() - began)


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--trees", type=int, default=1, help="images per batch")
    parser.add_argument("--capacity", type=int, default=0, help="tokens of a packed row; 0 is one tree")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex_attention"])
    asked = parser.parse_args()
    torch.manual_seed(0)
    model, pixels, image = llava() if asked.device == "cpu" else qwen2_5_vl()
    use_text_attention(model, asked.attention)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = add_lora(
        model, towers=("llm",), targets=None, r=8, alpha=16, dropout=0.0, rslora=False, dora=False,
        base_path=str(Path()),
    ).to(asked.device).train()  # fmt: skip
    trees = make_trees(asked.trees, asked.questions, image, 4096)
    rules = mask_rules(model)
    capacity = max(asked.capacity, max(tree.input_ids.size for tree in trees))
    ways = forms(model, pixels, capacity, asked.attention == "flex_attention")
    if asked.attention == "flex_attention":
        ways = ways[2:]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for form in ways * 2:
        step(model, optimizer, form, trees, rules, asked.device)
    speeds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    peaks = dict.fromkeys(speeds, 0.0)
    for _ in range(asked.rounds):
        for form in ways:
            if asked.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            speeds[form[0]].append(step(model, optimizer, form, trees, rules, asked.device))
            if asked.device == "cuda":
                peaks[form[0]] = torch.cuda.max_memory_allocated() / 2**30
    first = speeds[ways[0][0]]
    print(f"{parameters / 1e6:.1f} M parameters, {asked.questions} questions per image, {asked.trees} images per batch")
    for name, found in speeds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(found, first, strict=True))
        peak = f", peak {peaks[name]:.1f} GiB" if peaks[name] else ""
        print(f"{name:18s} {statistics.median(found):8.2f} rows/s, {ratio:5.2f} x{peak}")


if __name__ == "__main__":
    main()

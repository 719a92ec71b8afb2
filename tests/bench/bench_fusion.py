"""What fusion costs: early against transformers' own LLaVA, late and hybrid against early, in one process.

    python tests/bench/bench_fusion.py                  # 2 cores: 15 M parameters, fp32
    python tests/bench/bench_fusion.py --device cuda    # the same shapes on an accelerator
    python tests/bench/bench_fusion.py --before 256     # more words before the image

Random weights, the same for all: LLaVA's are copied into the composite model. A row is an image of 196 tokens with a
question (against LLaVA), or with a sound of 50 tokens too (the modes). A step is forward, backward and nothing else;
an answer is generated greedily with the cache. Sides take turns within each round, so a busy machine slows all
alike; a ratio is the median over rounds. On a CPU processor time is measured, which other jobs change little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtune.models.composite.config import CompositeConfig
from mmtune.models.composite.model import CompositeForConditionalGeneration
from mmtune.models.encoders import LogMelConfig
from mmtune.training.loss import answer_loss

IMAGE, AUDIO, PAD = 1, 2, 0
PATCHES, SOUNDS, FRAMES, MELS = 196, 50, 200, 40
BEFORE, QUESTION, ANSWER, VOCABULARY = 12, 24, 4, 4096
NEW_TOKENS = 16

Side = Callable[[], Any]


def vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=16,
    )  # fmt: skip


def text() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, intermediate_size=864, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=4096, pad_token_id=PAD, eos_token_id=None,
    )  # fmt: skip


def sides_of_llava() -> dict[str, Any]:
    """Returns LLaVA and the composite model of the same weights."""
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision(), text_config=text(), image_token_id=IMAGE))
    own = CompositeForConditionalGeneration(
        CompositeConfig(vision_config=vision(), text_config=text(), image_token_id=IMAGE)
    )
    own.load_state_dict(llava.state_dict())
    return {"transformers' LLaVA": llava, "composite, early": own}


def sides_of_modes() -> dict[str, Any]:
    """Returns one composite model of image and sound in every mode, of the same weights, one with auxiliary losses."""
    sound = LogMelConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_mel_bins=MELS
    )
    made: dict[str, Any] = {}
    ways = {mode: {"mode": mode} for mode in ("early", "late", "hybrid")}
    for name, fusion in (ways | {"hybrid, auxiliary": {"mode": "hybrid", "auxiliary_loss": 0.5}}).items():
        config = CompositeConfig(
            vision_config=vision(), audio_config=sound, text_config=text(), image_token_id=IMAGE,
            audio_token_id=AUDIO, audio_convolutions=[[3, 2, 1], [3, 2, 1]], fusion=fusion,
        )  # fmt: skip
        made[name] = CompositeForConditionalGeneration(config)
        made[name].load_state_dict(made["early"].state_dict(), strict=False)
    return made


def batch(rows: int, before: int, sounds: bool) -> dict[str, torch.Tensor]:
    """Returns rows of text, image, perhaps a sound, question and answer."""
    media = [IMAGE] * PATCHES + [AUDIO] * (SOUNDS if sounds else 0)
    words = torch.randint(3, VOCABULARY, (rows, before + QUESTION + ANSWER))
    ids = torch.cat((words[:, :before], torch.tensor(media).expand(rows, -1), words[:, before:]), dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(rows, 3, 224, 224),
    }
    if sounds:
        made |= {"input_features": torch.randn(rows, MELS, FRAMES), "feature_attention_mask": torch.ones(rows, FRAMES)}
    return made


def step(model: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Takes the loss of a batch forward and backward, as the training loop does: logits where there is a label."""
    model.train()
    answer_loss(model, given)[0].backward()
    model.zero_grad(set_to_none=True)


def generate(model: Any, given: Mapping[str, torch.Tensor]) -> None:
    """Answers a batch."""
    model.eval()
    asked = {name: value for name, value in given.items() if name != "labels"}
    with torch.inference_mode():
        model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD)


def seconds(work: Side, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def compare(title: str, sides: Mapping[str, Side], rounds: int, device: str) -> dict[str, float]:
    """Times the sides in turns and prints them; returns each one's median ratio to the first."""
    for work in list(sides.values()) * 2:
        work()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        # Who goes first changes, as a cache or a clock may favour the first.
        order = list(sides.items())[:: 1 if number % 2 else -1]
        for name, work in order:
            found[name].append(seconds(work, device))
    first = next(iter(found.values()))
    ratios = {
        name: statistics.median(mine / theirs for mine, theirs in zip(own, first, strict=True))
        for name, own in found.items()
    }
    print(title)
    for name, own in found.items():
        print(f"  {name:20s} {1000 * statistics.median(own):9.1f} ms, {ratios[name]:5.3f} x")
    return ratios


def main() -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--before", type=int, default=BEFORE, help="words before the image")
    parser.add_argument("--rounds", type=int, default=15)
    asked = parser.parse_args()
    torch.manual_seed(0)
    for of, sounds in ((sides_of_llava, False), (sides_of_modes, True)):
        models = {name: model.to(asked.device) for name, model in of().items()}
        given = {name: value.to(asked.device) for name, value in batch(asked.rows, asked.before, sounds).items()}
        works = {"a training step": step, f"{NEW_TOKENS} new tokens": generate}
        for title, work in works.items():
            sides: dict[str, Side] = {name: partial(work, model, given) for name, model in models.items()}
            compare(f"{title}, {asked.rows} rows of {given['input_ids'].shape[1]}", sides, asked.rounds, asked.device)


if __name__ == "__main__":
    main()

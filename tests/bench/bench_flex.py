"""What FlexAttention over packed trees costs per token against plain causal attention, on one GPU.

    python tests/bench/bench_flex.py                       # a CUDA machine; about 10 GB in $TMPDIR
    python tests/bench/bench_flex.py --tiny --device cpu   # a toy, forward pass alone: all that PyTorch has there

The language model of ``bench_gpu.py`` with its LoRA, over one long row: a bin of real trees by FlexAttention, its
mask made anew each time as for every batch; and as many tokens by SDPA without a mask, which on a GPU is its causal
flash kernel. The two take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_gpu import LORA, Size, make, size_of

from mmtune.models.adapter import add_lora
from mmtune.models.attention import FLEX, use_text_attention
from mmtune.models.load import load_model
from mmtune.storage import open_split
from mmtune.training.data import Trees
from mmtune.training.packing import pack, tree_lengths
from mmtune.training.tree_batch import packed_layout
from mmtune.training.tree_blocks import block_mask, flex_parts


def fullest_row(folder: Path, size: Size) -> dict[str, torch.Tensor]:
    """Returns spans and tiles of the first bin that packing fills, on the device."""
    table = open_split(folder / "run" / "tokens" / "train")
    fullest = pack(tree_lengths(table).tokens, size.bin_tokens)[0]
    layout = packed_layout([Trees(table).trees(fullest)], size.bin_tokens, None)
    return {name: value[0].to(size.device) for name, value in flex_parts(layout, (None,)).items()}


def seconds(folder: Path, size: Size) -> tuple[float, float]:
    """Returns the seconds of a pass with FlexAttention over trees, and with plain causal attention."""
    parts = fullest_row(folder, size)
    dtype = torch.bfloat16 if size.device == "cuda" else torch.float32
    model: Any = load_model(str(folder / "model"), dtype=dtype).to(size.device)
    model = add_lora(model, towers=("llm",), targets=None, **LORA).train()
    width = model.config.get_text_config().hidden_size
    hidden = torch.randn(1, size.bin_tokens, width, device=size.device, dtype=dtype)

    def run(kernel: str) -> float:
        use_text_attention(model, kernel)
        began = time.perf_counter()
        mask = block_mask(parts["spans"], parts["tiles"]) if kernel == FLEX else None
        with torch.set_grad_enabled(size.device == "cuda"):
            made = model.get_base_model().get_decoder()(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
            if size.device == "cuda":
                made.last_hidden_state.float().mean().backward()
                torch.cuda.synchronize()
        return time.perf_counter() - began

    rounds = [(run(FLEX), run("sdpa")) for _ in range(3 if size.tiny else 13)][2:]
    return statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)


def main() -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a toy model")
    asked = parser.parse_args()
    size = size_of(asked.tiny, asked.device, 20 if asked.tiny else 80)
    if size.device == "cpu" and not size.tiny:
        parser.error("a CPU is for --tiny alone")
    with tempfile.TemporaryDirectory(prefix="bench-flex-") as name:
        make(Path(name), size)
        trees, causal = seconds(Path(name), size)
    device = torch.cuda.get_device_name() if size.device == "cuda" else "cpu"
    kind = "forward and backward" if size.device == "cuda" else "forward only"
    print(
        f"{device}, torch {torch.__version__}, language model, {size.bin_tokens} tokens, {kind}: {trees:.3f} s with"
        f" FlexAttention over trees, {causal:.3f} s with plain causal attention: {trees / causal - 1:+.0%} per token"
        " (wanted: under +15%)"
    )


if __name__ == "__main__":
    main()

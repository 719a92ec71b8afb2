"""Memory of a step whose label tokens have many logits: the head over a part of them at a time, and over all at once.

    python tests/bench/bench_logits.py --tokens 2000

A LLaMA of two small layers with Qwen2.5's 151,936 words, LoRA, fp32; each way in a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import warnings

VOCABULARY, ROWS = 151_936, 4


def measure(tokens: int, at_once: bool) -> None:
    """Prints the peak of the process above its start, and its processor time, over a forward and a backward pass."""
    warnings.simplefilter("ignore")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from mmtune.training import cross_entropy
    from mmtune.training.loss import answer_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if at_once:
        cross_entropy._MOST_LOGITS = sys.maxsize
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"])).train()
    ids = torch.randint(VOCABULARY, (ROWS, tokens // ROWS + 1))
    before, began = _peak_mib(), time.process_time()
    found, count = answer_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    (found / count).backward()
    seconds = time.process_time() - began
    way = "at once" if at_once else "in parts"
    print(f"{way}: {count:,} label tokens, {_peak_mib() - before:,.0f} MiB above the start, {seconds:.1f} s")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measures both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="label tokens")
    parser.add_argument("--way", choices=["parts", "once"], help="this way alone, in this process")
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.tokens, arguments.way == "once")
        return
    for way in ("once", "parts"):
        command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--way", way]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

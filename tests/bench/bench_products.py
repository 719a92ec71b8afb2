"""Products of linear layers in fp32: PyTorch's own (MKL) and oneDNN's, side by side, and what a kernel costs.

    python tests/bench/bench_products.py
    python tests/bench/bench_products.py --threads 1

The first two shapes are the MLP of the 15 M-parameter LLaVA of ``bench_trl.py`` over a tree of five questions, the
third its attention's layers, the fourth its vision tower's MLP, the last two layers of CLIP's base tower over eight
images at once.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mmtune.models import products

SHAPES = ((298, 320, 864), (298, 864, 320), (298, 320, 320), (197, 256, 1024), (1576, 768, 768), (1576, 768, 3072))
ROUNDS, SECONDS = 5, 0.05


def microseconds(run: Callable[[], torch.Tensor]) -> float:
    """Returns the time of a call, the quickest of some rounds."""
    run()
    began = time.perf_counter()
    run()
    calls = max(int(SECONDS / (time.perf_counter() - began)), 1)
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - began) / calls)
    return min(found) * 1e6


def side_by_side(tokens: int, inputs: int, outputs: int) -> str:
    """Returns a line: a layer forward, the gradient of its input, and that of its weight, by both."""
    x, weight, grad = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    runs = {
        "forward": partial(products.times, x, weight),
        "input": partial(products.times, grad, weight.t()),
        "weight": partial(products.times_transposed, grad, x),
    }
    told = []
    for name, run in runs.items():
        found = {}
        for least in (1 << 62, 0):
            products._LEAST = least
            found[least] = microseconds(run)
        own, wide = found.values()
        told.append(f"{name} {own:.0f} and {wide:.0f} us, {own / wide:.2f} x")
    flops = 2 * tokens * inputs * outputs
    return f"{tokens} x {inputs} by {outputs} ({flops / 1e9:.2f} GFLOP): " + "; ".join(told)


def kernels(count: int) -> str:
    """Returns a line: what the first product of a shape costs beside the next ones, in time and memory."""
    weight, extra = torch.randn(864, 320), []
    before = resident_kib()
    for tokens in range(400, 400 + count):
        x, found = torch.randn(tokens, 320), []
        for _ in range(2):
            began = time.perf_counter()
            products._product(x, weight)
            found.append(time.perf_counter() - began)
        extra.append(found[0] - found[1])
    return f"a new shape: {statistics.median(extra) * 1e3:.2f} ms, {(resident_kib() - before) / count:.0f} KiB"


def resident_kib() -> int:
    """Returns the memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 10


def main() -> None:
    """Prints a line per shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    if not products.has_onednn():
        raise SystemExit("this PyTorch multiplies no dense matrices by oneDNN")
    print(f"{torch.get_num_threads()} threads; taken on this processor: {products.has_wide_products()}")
    products.has_wide_products = lambda: True
    for shape in SHAPES:
        print(side_by_side(*shape), flush=True)
    print(kernels(100))


if __name__ == "__main__":
    main()

"""Matrix products on cores that another process uses too, by how long threads wait for each other in a loop.

    python tests/bench/bench_crowded.py                # alone, and beside one busy process
    python tests/bench/bench_crowded.py --beside 0,2

``GOMP_SPINCOUNT`` is read once per process, so each line is a process of its own: seconds for 200 products of 300 x 320
by 320 x 864, the median of five, with OpenMP's own wait and with the one that mmtune sets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from bench_trl import busy_processes

_OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
_MEASURE = """
import statistics, time, torch
torch.set_num_threads({threads})
x, w, found = torch.randn(300, 320), torch.randn(864, 320), []
for _ in range(5):
    began = time.perf_counter()
    for _ in range(200):
        torch.mm(x, w.t())
    found.append(time.perf_counter() - began)
print(statistics.median(found))
"""


def main() -> None:
    """Prints a line per wait and number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", default="0,1", help="numbers of busy processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    for beside in map(int, asked.beside.split(",")):
        for wait in ("OpenMP's own", "5000"):
            environment = {name: value for name, value in os.environ.items() if name not in _OURS}
            if wait.isdigit():
                environment["GOMP_SPINCOUNT"] = wait
            command = [sys.executable, "-c", _MEASURE.format(threads=asked.threads)]
            with busy_processes(beside):
                rounds = [float(subprocess.check_output(command, env=environment)) for _ in range(3)]
            print(f"{beside} beside, wait {wait}: {statistics.median(rounds):.2f} s", flush=True)


if __name__ == "__main__":
    main()

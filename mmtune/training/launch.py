"""The command that starts several processes: Accelerate's own launcher, never a shell string."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

LAUNCHED = "MMTUNE_LAUNCHED"


def launch_command(processes: int, arguments: Sequence[str], *, cpu: bool = False, port: int = 0) -> list[str]:
    """Returns the argument list that runs ``mmtune`` on several processes of this machine.

    Args:
        processes: How many.
        arguments: Arguments of ``mmtune`` itself.
        cpu: Use CPU processes with gloo.
        port: Port of the rendezvous; 0 lets the launcher find a free one.
    """
    if cpu:
        # Accelerate's launcher asks for MPI on CPUs; torchrun sets the same variables that Accelerate reads.
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        return [*launcher, "--standalone", "-m", "mmtune", *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, "--main_process_port", str(port), "-m", "mmtune", *arguments]


def launch_environment(processes: int, *, cpu: bool = False) -> dict[str, str]:
    """Returns the environment for the launched processes; the cores are shared among them."""
    environment = dict(os.environ)
    environment[LAUNCHED] = "1"
    if cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    return environment


def is_launched() -> bool:
    """Says whether this process was started by a launcher (ours, torchrun or accelerate)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Says whether this is the process that talks and writes."""
    return int(os.environ.get("RANK", "0")) == 0

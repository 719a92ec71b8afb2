"""Starting several processes: the launchers of Accelerate and torchrun, never a shell string."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmtune.errors import EXIT_FOLDER, CapabilityError, Interrupted, MmtuneError, ResourceError
from mmtune.signals import exit_code_of, hear

LAUNCHED = "MMTUNE_LAUNCHED"
CPU_ONLY = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
"""Environment of a process that takes no GPU, also where there is one."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of a run; each starts the same command and they find each other at the rendezvous.

    Attributes:
        count: How many.
        rendezvous: ``host:port`` of one of them, the same on all.
        run_id: Tells this run from others at the same rendezvous.
    """

    count: int = 1
    rendezvous: str = ""
    run_id: str = "mmtune"


def launch_command(
    processes: int, arguments: Sequence[str], *, cpu: bool = False, port: int = 0, nodes: Nodes = Nodes()
) -> list[str]:
    """Returns the argument list that runs ``mmtune`` on several processes of this machine.

    Args:
        processes: How many.
        arguments: Arguments of ``mmtune`` itself.
        cpu: Use CPU processes with gloo.
        port: Port of the rendezvous on one machine; 0 lets the launcher find a free one.
        nodes: Machines, when there are several.
    """
    python = [sys.executable, "-m", "mmtune.training.launcher"]
    torchrun = [*python, "torch.distributed.run", "--nproc_per_node", str(processes)]
    if nodes.count > 1:
        place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", nodes.rendezvous, "--rdzv_id", nodes.run_id]
        return [*torchrun, "--nnodes", str(nodes.count), *place, "-m", "mmtune", *arguments]
    if cpu:
        # Accelerate's launcher asks for MPI on CPUs; torchrun sets the same variables that Accelerate reads.
        return [*torchrun, "--standalone", "-m", "mmtune", *arguments]
    launcher = [*python, "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, "--main_process_port", str(port), "-m", "mmtune", *arguments]


def launch_environment(processes: int, *, cpu: bool = False) -> dict[str, str]:
    """Returns the environment for the launched processes; the cores are shared among them."""
    environment = {**os.environ, **(CPU_ONLY if cpu else {})}
    environment[LAUNCHED] = "1"
    if cpu:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    return environment


def launch(
    what: str,
    arguments: Sequence[str],
    processes: int,
    *,
    cpu: bool,
    say: Callable[[str], None],
    nodes: Nodes = Nodes(),
) -> None:
    """Runs ``mmtune`` on several processes of this machine; returns when all of them have ended well.

    Args:
        what: The command, for what is said.
        arguments: Arguments of ``mmtune`` itself.
        processes: How many.
        cpu: Use CPU processes with gloo.
        say: Receives the command that is started.
        nodes: Machines, when there are several.

    Raises:
        CapabilityError: There are fewer GPUs than asked for.
        ResourceError: A process died without a word of its own.
        Interrupted: A signal came before the launcher had started one.
        MmtuneError: What the first process to fail said.
    """
    if not cpu:
        need_gpus(processes)
    command = launch_command(processes, arguments, cpu=cpu, nodes=nodes)
    say(f"{what}: starting " + " ".join(command))
    with tempfile.TemporaryDirectory(prefix="mmtune-") as folder:
        environment = {**launch_environment(processes, cpu=cpu), EXIT_FOLDER: folder}
        # A session of its own: Ctrl-C then reaches the processes once, through this one.
        child = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=partial(end_with, os.getpid())
        )
        asked: list[int] = []

        def hand_on(received: int, _: object) -> None:
            asked.append(received)
            child.send_signal(received)

        hear(hand_on)
        code = child.wait()
        said = _errors_in(Path(folder))
    # A launcher that loses one process stops the others. They say that they were stopped, which is not the cause.
    all_stopped = all(each.exit_code == Interrupted.exit_code for each in said)
    if code and asked and not said:
        # Its launcher was stopped before it started one.
        stopped = Interrupted("stopped before a process was started", "run the same command again")
        stopped.exit_code = exit_code_of(asked[0])
        raise stopped
    lost = not said or (all_stopped and len(said) < processes and not asked)
    if code and lost:
        raise ResourceError(
            f"a process of this run died (the launcher ended with {code})",
            "look for its last words above; run the same command again to go on from the last checkpoint",
            "lost_process",
        )
    if code:
        raise said[0]


def need_gpus(count: int) -> None:
    """Refuses ``--gpus`` where this machine has fewer.

    Raises:
        CapabilityError: There are fewer.
    """
    import torch

    found = torch.cuda.device_count()
    if found < count:
        raise CapabilityError(
            f"--gpus {count}: this machine has {found or 'none'}",
            f"{'use fewer, or ' if found else ''}train on CPU processes with --cpu-processes {count}",
            "gpus_missing",
        )


def _errors_in(folder: Path) -> list[MmtuneError]:
    """Returns what the processes of a run ended with, the first to fail first."""
    found = []
    # One that was killed while it wrote left nothing to read.
    written = [each for each in folder.iterdir() if each.stat().st_size]
    for file in sorted(written, key=lambda each: each.stat().st_mtime_ns):
        said = json.loads(file.read_text("utf-8"))
        error = MmtuneError(said["message"], said["hint"], said["code"])
        error.exit_code = said["exit_code"]
        found.append(error)
    return found


def end_with(parent: int) -> None:
    """Lets this process get a SIGTERM when its parent ends, however that ends; on Linux, elsewhere nothing.

    A launcher that is killed cannot tell its processes. They are told by the kernel, save their state and leave.

    Args:
        parent: Process id of the parent, as it was known while it lived.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def is_launched() -> bool:
    """Says whether this process was started by a launcher (ours, torchrun or accelerate)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Says whether this is the process that talks and writes."""
    return int(os.environ.get("RANK", "0")) == 0

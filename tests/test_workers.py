"""Ordered work: the same for any number of processes, and nothing hangs when one of them dies."""

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mmtune.errors import ResourceError
from mmtune.workers import in_order

# Functions of the standard library, which every process can import: ``make(f)()`` is f.
SLOWLY = """
import signal, sys, time
from functools import partial
from mmtune.workers import in_order
# A background job of a shell starts with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
units = iter([0.0] * 4 + [float(sys.argv[1])] * 40)
for done in in_order(partial(partial, time.sleep), units, processes=2, inline=0, setting="x"):
    print("one", flush=True)
"""


def ordered(function, units, processes, inline=0):
    return in_order(partial(partial, function), units, processes=processes, inline=inline, setting="tokenize.workers")


@pytest.mark.parametrize(("processes", "inline"), [(1, 0), (2, 0), (2, 5), (3, 1)])
def test_order_does_not_depend_on_the_number_of_processes(processes, inline):
    assert list(ordered(math.factorial, iter(range(40)), processes, inline)) == [math.factorial(n) for n in range(40)]


def test_a_small_job_starts_no_process():
    assert set(ordered(lambda _: os.getpid(), range(4), 2, inline=4)) == {os.getpid()}


def test_units_are_read_as_they_are_needed():
    read = []
    units = (read.append(number) or number for number in range(100))
    for at, _ in enumerate(ordered(abs, units, 2)):
        assert len(read) <= at + 6


def test_a_killed_process_is_a_clear_error():
    with pytest.raises(ResourceError) as caught:
        list(ordered(os._exit, range(20), 2))
    assert caught.value.code == "worker_died" and "--set tokenize.workers=1" in caught.value.hint


def test_an_error_of_the_work_comes_through():
    with pytest.raises(ValueError, match="factorial"):
        list(ordered(math.factorial, [3, -1, 4], 2))


def start(seconds: float) -> subprocess.Popen:
    """A run in its own process group, two workers busy."""
    command = [sys.executable, "-c", SLOWLY, str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True)
    for _ in range(4):
        assert child.stdout.readline() == "one\n"
    return child


def group(leader: int) -> list[str]:
    """Live processes of a session, by their command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_a_stopped_run_leaves_no_process(number, to_all):
    child = start(0.3 if to_all else 60.0)
    assert len(group(child.pid)) >= 3
    (os.killpg if to_all else os.kill)(child.pid, number)
    child.wait(20)
    assert child.returncode == -number
    until = time.monotonic() + 20
    while group(child.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert group(child.pid) == []

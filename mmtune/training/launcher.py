"""The launchers of torchrun and Accelerate, without a traceback of their own where a signal stopped them.

``python -m mmtune.training.launcher MODULE ARGUMENTS`` is ``python -m MODULE ARGUMENTS``.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Runs the launcher that the command line names; ends with 128 and the signal's number where one stopped it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    del sys.argv[0]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SignalException as stopped:
        # The processes were stopped before, and said so; where this one stood says nothing.
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()

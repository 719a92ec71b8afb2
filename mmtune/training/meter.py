"""Where the time of a run goes, and the sums behind a line of metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

PARTS = ("wait", "forward", "backward", "sync", "optimizer", "save", "validate", "total")
_WORK = ("forward", "backward", "sync", "optimizer")
_OWN = ("wait", "forward", "backward", "optimizer")


class Clock:
    """Seconds by part of the run; what no part claims is only in ``total``.

    Attributes:
        spent: Seconds of every part so far.
        teamwork: How the processes shared the steps.
    """

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._own = 0.0
        self.teamwork = Teamwork()
        self._began = self._since = time.perf_counter()

    def lap(self, part: str) -> float:
        """Counts the time since the last lap to a part; returns it in seconds."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.spent[part] += seconds
        return seconds

    def skip(self) -> None:
        """Counts the time since the last lap to no part."""
        self._since = time.perf_counter()

    def own(self) -> float:
        """Returns the seconds of a process's own work since it was last asked, see ``Teamwork``."""
        own = sum(self.spent[part] for part in _OWN)
        since, self._own = own - self._own, own
        return since

    def stop(self) -> dict[str, float]:
        """Returns the seconds of every part and of the whole."""
        return {**self.spent, "total": time.perf_counter() - self._began}


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Returns ``overhead_share``, ``wait_share`` and ``sync_share`` of the time that went into steps.

    Overhead is all but forward, backward, optimizer and the exchange of gradients between processes
    (``sync``); validation is no part of a step.
    """
    steps = max(seconds["total"] - seconds["validate"], 1e-9)
    overhead = steps - sum(seconds[part] for part in _WORK)
    return {
        "overhead_share": round(max(overhead / steps, 0.0), 4),
        "wait_share": round(seconds["wait"] / steps, 4),
        "sync_share": round(seconds["sync"] / steps, 4),
    }


class Teamwork:
    """How evenly the processes of a run are loaded, and what their exchange costs.

    A process's own time of a step is what it spends on waiting for data, on forward and backward pass and on the
    optimizer. Then it waits for the others and exchanges gradients and losses. Where the model is spread over the
    processes, these also meet inside the passes; that counts as own time, and the efficiency is an upper bound.
    """

    def __init__(self) -> None:
        self._mean = self._longest = self._whole = 0.0
        self._warm = False

    def add(self, own: Sequence[float], rank: int, exchange: float) -> None:
        """Adds one step: every process's own seconds, and those that the process ``rank`` spent on the exchange.

        The first step, in which everything warms up, is left out.
        """
        if not self._warm:
            self._warm = True
            return
        self._mean += sum(own) / len(own)
        self._longest += max(own)
        self._whole += own[rank] + exchange

    def facts(self) -> dict[str, float]:
        """Returns ``scaling_efficiency`` and ``rank_balance``; 1 is the best of both. Nothing without a second step.

        The efficiency is own time, as the mean over processes, by the whole time of the steps: times the number of
        processes it estimates the speedup over one process that does the same work; what processes lose by sharing
        cores, memory or a disk counts as own time. The balance is the mean own time by
        that of each step's slowest process. What it lacks goes into waiting for the slowest, what the efficiency
        lacks beyond that into moving gradients.
        """
        if not self._longest:
            return {}
        return {
            "scaling_efficiency": round(self._mean / self._whole, 4),
            "rank_balance": round(self._mean / self._longest, 4),
        }


class Window:
    """Sums since the last line of metrics."""

    def __init__(self) -> None:
        self.clear()

    def clear(self, waited: float = 0.0) -> None:
        """Starts a new window; ``waited`` seconds were spent waiting for data before it."""
        self._waited = waited
        self._nll = self._norm = 0.0
        self._targets = 0
        self.rows = self.tokens = 0
        self._since = time.perf_counter()

    def add(self, nll: float, targets: int, norm: float) -> None:
        """Adds one step: summed loss, label tokens, norm of the gradient."""
        self._nll, self._targets, self._norm = self._nll + nll, self._targets + targets, norm

    def leave_out(self, seconds: float) -> None:
        """Takes seconds that just went into no step (a save, a validation) out of the rates of the next line."""
        self._since += seconds

    def state(self) -> dict[str, float]:
        """Returns the sums that a checkpoint keeps, so that the next line after a resume speaks of all its steps."""
        return {"nll": self._nll, "targets": self._targets}

    def restore(self, state: dict[str, float]) -> None:
        """Takes up the sums of a checkpoint."""
        self._nll, self._targets = float(state["nll"]), int(state["targets"])

    def line(self, step: int, rate: float, waited: float = 0.0) -> dict[str, Any]:
        """Returns the line of metrics after ``step`` steps, and starts a new window.

        Args:
            step: Steps done.
            rate: Learning rate of the last one.
            waited: Seconds spent waiting for data since the run began.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        row = {
            "step": step,
            "loss": self._nll / max(self._targets, 1),
            "learning_rate": rate,
            "grad_norm": self._norm,
            "rows_per_second": round(self.rows / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "wait_share": round((waited - self._waited) / seconds, 4),
        }
        self.clear(waited)
        return row


def meter_note(row: dict[str, Any]) -> str:
    """Returns a line of metrics in few words, for the live line."""
    use = f" MFU={row['mfu']:.0%}" if "mfu" in row else ""
    return (
        f"loss={row['loss']:.4f} lr={row['learning_rate']:.2e} rows/s={row['rows_per_second']:.0f}"
        f" tokens/s={row['tokens_per_second']:.0f}{use} waiting={row['wait_share']:.0%}"
    )


def validated(stage: str, row: dict[str, Any]) -> str:
    """Returns what a line of metrics with a validation loss says to a person."""
    return f"{stage}: step {row['step']:,}, val loss {row['val_loss']:.4f}"

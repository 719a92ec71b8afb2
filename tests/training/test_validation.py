"""The loss on held-out rows: a mean over label tokens, given up between two batches when a signal came."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from course import LENGTH, Rows, run, tiny_model

from mmtune.training.loss import answer_loss
from mmtune.training.plan import Plan, TreeSizes
from mmtune.training.signals import Stopped
from mmtune.training.validation import validation_loss


def plan_of(rows):
    numbers = np.arange(rows.count)
    sizes = TreeSizes(np.ones_like(numbers), np.full_like(numbers, LENGTH), 1 + numbers % 3, numbers * 0)
    return Plan(sizes, 0, 10**6, 2, 1, 1.0)


def held_out(model, rows, stopping):
    return validation_loss(model, Accelerator(cpu=True), plan_of(rows), rows.batch, stopping=stopping)


def test_it_is_the_mean_over_label_tokens():
    model, rows = tiny_model().eval(), Rows(count=7)
    found = held_out(model, rows, lambda: False)
    with torch.no_grad():
        nll, count = answer_loss(model, rows.batch(range(7)))
    assert found == pytest.approx(float(nll) / count, rel=1e-5)
    assert sorted(rows.seen[:7]) == list(range(7))


@pytest.mark.parametrize("after", [0, 2])
def test_it_is_given_up_before_the_next_batch(after):
    rows, asked = Rows(count=8), []

    def stopping():
        asked.append(1)
        return len(asked) > after

    with pytest.raises(Stopped):
        held_out(tiny_model(), rows, stopping)
    assert len(rows.seen) == 2 * after


class Signalled(Rows):
    """Held-out rows whose second batch is interrupted by a signal."""

    def batch(self, rows, step=None):
        made = super().batch(rows, step)
        if len(self.seen) == 4:
            signal.raise_signal(signal.SIGTERM)
        return made


@pytest.mark.parametrize(("eval_every", "at"), [(2, 2), (None, 4)], ids=["within", "at the end"])
def test_a_signal_in_the_middle_of_it_ends_in_the_same_numbers(eval_every, at):
    def trained(model, validation, **more):
        validate = lambda stopping: held_out(model, validation, stopping)  # noqa: E731
        return run(model, Rows(), steps=4, eval_every=eval_every, validate=validate, **more)

    whole, model = tiny_model(), tiny_model()
    unbroken = trained(whole, Rows(count=8))
    validation = Signalled(count=8)
    broken = trained(model, validation)
    assert (broken.outcome.step, broken.outcome.stopped_by, broken.saved) == (at, signal.SIGTERM, [at])
    assert len(validation.seen) == 4 and "val_loss" not in broken.texts[at]
    more = {"start": at, "metrics": broken.texts[at], "sums": broken.sums[at], "optimizer": broken.optimizer}
    resumed = trained(model, Rows(count=8), **more)
    assert losses(resumed) == losses(unbroken) and len(losses(resumed)) == (6 if eval_every else 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def losses(result):
    import json

    rows = [json.loads(line) for line in result.outcome.metrics.splitlines()]
    return [(row["step"], name, row[name]) for row in rows for name in ("loss", "val_loss") if name in row]

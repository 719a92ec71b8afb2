"""Batches come in order and ahead; what goes wrong while one is made arrives whole."""

import os
import signal
from contextlib import closing

import pytest
import torch

from mmtune.errors import IntegrityError, ResourceError
from mmtune.media.paths import MediaRefused
from mmtune.training.feed import feed


def number(value):
    return {"n": torch.tensor(value)}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order(workers):
    assert [int(batch["n"]) for batch in feed(number, range(9), workers)] == list(range(9))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [IntegrityError("a.jpg changed", "tokenize again", "media_changed"), MediaRefused("decode_error", "b.png")]
)
def test_an_error_arrives_whole_and_in_its_place(workers, error):
    def make(value):
        if value == 3:
            raise error
        return number(value)

    with closing(feed(make, range(9), workers)) as batches:
        assert [int(next(batches)["n"]) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error)) as caught:
            next(batches)
    found = caught.value
    assert (found.message, found.hint, found.code, found.exit_code) == (
        error.message,
        error.hint,
        error.code,
        error.exit_code,
    )


def test_a_killed_worker_is_a_clear_error():
    def make(value):
        if value == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number(value)

    with closing(feed(make, range(9), 2)) as batches, pytest.raises(ResourceError, match="was killed") as caught:
        list(batches)
    assert caught.value.code == "worker_died" and "finetune.workers" in caught.value.hint

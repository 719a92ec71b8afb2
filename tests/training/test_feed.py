"""Batches come in order and ahead; what goes wrong while one is made arrives whole."""

import pytest
import torch

from mmtune.errors import IntegrityError
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

    batches = feed(make, range(9), workers)
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

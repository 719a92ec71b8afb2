"""What is said of filled-in codes: the formulas by NumPy, perfect and useless generators, and media shown twice."""

import numpy as np
import pytest
import torch

from mmtune.training.filling import compared, rows_to_fill


def test_error_and_recall_are_the_formulas_in_numpy():
    dice = np.random.default_rng(0)
    true = dice.normal(size=(40, 6)).astype(np.float32)
    made = (true + dice.normal(size=true.shape)).astype(np.float32)
    error, recall, pool = compared(torch.from_numpy(made), torch.from_numpy(true), torch.arange(40) * 7)
    assert error == pytest.approx(((made - true) ** 2).sum(1).mean() / true.var(0).sum(), rel=1e-5)
    unit = [own / np.linalg.norm(own, axis=1, keepdims=True) for own in (made, true)]
    assert recall == ((unit[0] @ unit[1].T).argmax(1) == np.arange(40)).mean()
    assert 0.2 < recall < 0.9 and pool == 40


def test_the_true_codes_are_found_and_the_mean_has_an_error_of_one():
    true = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    assert compared(true, true, torch.arange(30)) == (0.0, 1.0, 30)
    error, recall, _ = compared(true.mean(0).expand(30, -1), true, torch.arange(30))
    assert error == pytest.approx(1.0, rel=1e-5) and recall == pytest.approx(1 / 30)


def test_rows_that_show_one_medium_have_one_true_code():
    true = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [-1.0, 0]])
    made = torch.tensor([[1.0, 0.1], [0.9, 0], [0, 1.0], [0, 1.0]])
    assert compared(made, true, torch.tensor([5, 5, -3, 9]))[1:] == (0.75, 3)


def test_rows_whose_parts_do_not_belong_together_have_nothing_to_fill_in():
    sources = ["twin", "agree", "twin", "other"]
    assert rows_to_fill(("twin", "third"), sources) == [0, 2]
    assert rows_to_fill((), sources) == rows_to_fill(("third",), sources) == [0, 1, 2, 3]

"""The linear autoencoder reaches PCA; every modality is decoded; a missing one is filled in from the other."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mmtune.errors import RecipeError
from mmtune.models.fusion.gate import modality_dropout
from mmtune.models.objectives.autoencoder import Autoencoder


@pytest.fixture(scope="module")
def halves():
    """Real digits, upper and lower half as two modalities, (1797, 32) each."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16.0
    return {"upper": pixels[:, :32], "lower": pixels[:, 32:]}


def train(model, features, steps, dropout=0.0, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(len(features["upper"]), 2, dtype=torch.bool)
    for _ in range(steps):
        kept = modality_dropout(present, dropout, generator) if dropout else None
        loss = sum(model.losses(features, kept_BK=kept).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def test_the_loss_is_the_formula_in_numpy(halves):
    torch.manual_seed(0)
    model = Autoencoder({"upper": 32, "lower": 32}, 5)
    weights = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    rows = {name: part[:20].double().numpy() for name, part in halves.items()}

    def layer(side, name, x):
        return x @ weights[f"{side}.{name}.weight"].T + weights[f"{side}.{name}.bias"]

    code = sum(layer("encoders", name, x) for name, x in rows.items()) / 2
    found = model.losses({name: part[:20] for name, part in halves.items()})
    for name, x in rows.items():
        wanted = ((x - layer("decoders", name, code)) ** 2).sum(1).mean()
        assert found[name].item() == pytest.approx(wanted, rel=1e-5)


def test_the_linear_autoencoder_reaches_pca(halves):
    torch.manual_seed(0)
    joined = np.concatenate([halves["upper"], halves["lower"]], axis=1)
    pca = PCA(8).fit(joined)
    best = ((joined - pca.inverse_transform(pca.transform(joined))) ** 2).sum(1).mean()
    model = Autoencoder({"upper": 32, "lower": 32}, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(model.losses(halves).values())
        loss.backward()
        return loss

    optimizer.step(closure)
    found = sum(loss.item() for loss in model.losses(halves).values())
    # 150 iterations end 0.01 % above PCA.
    assert best * (1 - 1e-4) <= found <= best * 1.002, (found, best)
    codes = model.reduce(halves)
    assert codes.shape == (1797, 8) and not codes.requires_grad


def test_a_missing_modality_is_filled_in_better_than_by_the_mean(halves):
    torch.manual_seed(0)
    seen, held_out = ({name: part[rows] for name, part in halves.items()} for rows in (slice(1400), slice(1400, None)))
    model = train(Autoencoder({"upper": 32, "lower": 32}, 16, 64), seen, 300, dropout=0.5)
    kept = torch.tensor([[True, False]]).expand(len(held_out["upper"]), -1)
    error = model.errors(held_out, kept_BK=kept)["lower"].mean()
    by_mean = (held_out["lower"] - seen["lower"].mean(0)).square().sum(1).mean()
    assert error < 0.8 * by_mean, (error, by_mean)
    alone = model.decode(model.encode({"upper": held_out["upper"]}))["lower"]
    torch.testing.assert_close((held_out["lower"] - alone).square().sum(1).mean(), error)


def test_mismatched_pairs_have_the_larger_error(halves):
    torch.manual_seed(0)
    model = train(Autoencoder({"upper": 32, "lower": 32}, 8, 64), halves, 300)
    true = sum(model.errors(halves).values())
    mixed = sum(model.errors({"upper": halves["upper"], "lower": halves["lower"].roll(7, 0)}).values())
    assert (mixed > true).float().mean() > 0.8


def test_rows_without_a_modality_neither_score_nor_encode_it():
    torch.manual_seed(0)
    model = Autoencoder({"one": 4, "two": 3}, 2)
    features = {"one": torch.randn(3, 4, requires_grad=True), "two": torch.randn(3, 3, requires_grad=True)}
    present = torch.tensor([[True, True], [True, False], [False, False]])
    losses = model.losses(features, present)
    errors = model.errors(features, present)
    assert losses["two"] == errors["two"][0] and errors["two"][1:].tolist() == [0, 0]
    torch.testing.assert_close(losses["one"], errors["one"][:2].mean())
    sum(losses.values()).backward()
    assert features["two"].grad[1:].abs().max() == 0 and features["one"].grad[2].abs().max() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_may_lack_a_modality_and_not_all():
    model = Autoencoder({"one": 4, "two": 3}, 2)
    assert list(model.losses({"two": torch.randn(3, 3)})) == ["two"]
    with pytest.raises(ValueError, match="none of one, two"):
        model.encode({})


def test_a_code_wider_than_the_features_is_refused():
    with pytest.raises(RecipeError, match="a code of 8 is wider"):
        Autoencoder({"one": 4, "two": 3}, 8)

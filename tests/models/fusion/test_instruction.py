"""A resampler alone, asked for one of two things that a picture says, passes on what is asked and no more."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmtune.models.fusion.projector import build_projector
from mmtune.models.objectives.negatives import other_rows

CLASSES, TOKENS, WIDTH = 4, 6, 32


def rows(count, generator):
    """Features of pictures whose tokens say two classes, the embedding of the question, and the class asked for."""
    fixed = torch.Generator().manual_seed(5)
    said = torch.randn(2, CLASSES, 16, generator=fixed)
    # Questions have most of their words in common.
    asked = torch.randn(1, WIDTH, generator=fixed) + 0.5 * torch.randn(2, WIDTH, generator=fixed)
    classes = torch.randint(CLASSES, (count, 2), generator=generator)
    kind = torch.randint(2, (count,), generator=generator)
    features = 0.5 * torch.randn(count, TOKENS, 16, generator=generator)
    features[:, 1] += said[0][classes[:, 0]]
    features[:, 4] += said[1][classes[:, 1]]
    return features, asked[kind], kind, classes.gather(1, kind[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["perceiver", "qformer"])
def test_it_passes_on_what_is_asked(kind):
    torch.manual_seed(0)
    resampler = build_projector(kind, 16, WIDTH, queries=1, layers=2, heads=4)
    head = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.AdamW([*resampler.parameters(), *head.parameters()], lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        features, asked, _, wanted = rows(64, draw)
        loss = functional.cross_entropy(head(resampler(features, None, asked)[:, 0]), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, asked, about, wanted = rows(1000, torch.Generator().manual_seed(1))
    shuffled = asked[other_rows(about, draw)[0]]
    with torch.no_grad():
        right, wrong = (
            float((head(resampler(features, None, one)[:, 0]).argmax(-1) == wanted).float().mean())
            for one in (asked, shuffled)
        )
    # The other question's class is the right one in one of four.
    assert right > 0.9 and abs(wrong - 1 / CLASSES) < 0.06, (right, wrong)

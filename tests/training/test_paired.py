"""Which rows share what, and whose media a row may be shown with."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from mmtune.encoding.render import EncodedRow, MediaSpan
from mmtune.errors import RecipeError
from mmtune.models.composite.encoded import word_summary
from mmtune.models.objectives.masked import match_pairs
from mmtune.records import Medium
from mmtune.training.paired import PARTS, PairCollator, together_of
from mmtune.training.tally import Tally


def row(text, image=None, sound=None):
    ids, media = [], []
    for kind, name in (("image", image), ("audio", sound)):
        if name:
            media.append(MediaSpan(Medium(kind, name), len(ids), 3))
            ids += [9, 9, 9]
    ids = np.array([*ids, *text], dtype=np.int32)
    return EncodedRow(ids, np.where(np.arange(ids.size) == ids.size - 1, ids, -100), tuple(media))


def keys_of(*rows):
    return PairCollator(lambda made, step: {})(rows)["keys"]


def test_rows_share_a_medium_or_question_and_answer():
    keys = keys_of(
        row([1, 2, 5], "a.png"),
        row([1, 3, 5], "a.png", "b.wav"),
        row([1, 2, 5], "c.png", "b.wav"),
        row([1, 2, 5]),
    )
    image, audio, text = (keys[:, PARTS.index(name)].tolist() for name in ("image", "audio", "text"))
    assert image[0] == image[1] != image[2] and len(set(image)) == 3
    assert audio[1] == audio[2] and len(set(audio)) == 3
    # The same answer to another question is another text; media are no part of it.
    assert text[0] == text[2] == text[3] != text[1]


def test_media_are_swapped_in_half_of_the_rows_that_can():
    group = torch.tensor([0, 1, 2, 3, 4, 4])
    able = torch.zeros(6, 6, dtype=torch.bool)
    able[:3, :3] = able[4:, 4:] = True
    generator, swapped = torch.Generator().manual_seed(0), torch.zeros(6)
    for _ in range(400):
        shown, matched = match_pairs(group, generator, able)
        assert bool(able[torch.arange(6), shown][~matched].all()) and bool((group[shown] != group)[~matched].all())
        swapped += (~matched).float() / 400
    # Row 3 may be shown with nothing else, rows 4 and 5 share theirs.
    assert swapped[:3].tolist() == pytest.approx([0.5] * 3, abs=0.08) and swapped[3:].tolist() == [0, 0, 0]


def test_words_are_counted_in_bins_that_ids_spread_over():
    ids = torch.arange(6400)[None].expand(2, -1)
    words = torch.stack((torch.ones(6400), torch.zeros(6400))).bool()
    counts = word_summary(ids, words)
    assert counts.shape == (2, 64) and counts[0].sum() == 6400 and counts[1].sum() == 0
    assert counts[0].min() > 80 and counts[0].max() < 120
    assert bool((word_summary(ids * 20_000, words)[0] > 0).all())


def test_the_tally_of_several_processes_is_one_weighted_mean():
    mine, theirs = Tally(), Tally()
    mine.add({"a": 1.0, "b": 2.0}, 1)
    theirs.add({"a": 4.0}, 3)

    def over_all(own):
        other = theirs.state()
        return {name: own.get(name, 0) + other.get(name, 0) for name in {*own, *other}}

    assert mine.line(over_all) == {"a": 3.25, "b": 2.0} and mine.line() == {}


class Named:
    """Batches whose units are told by name alone."""

    def __init__(self, names):
        self.names = names

    def batch(self, units, step=None):
        return {}

    def ids(self, units):
        return [self.names[unit] for unit in units]


def test_codes_are_learned_from_the_rows_of_the_named_sources():
    tables = [
        pa.table({"id": ["a", "b", "c"], "source": ["twin", "agree", "twin"]}),
        pa.table({"id": ["d"], "source": ["agree"]}),
    ]
    rows = Named(["a", "b", "c", "d"])
    found = together_of(tables, ["twin"])
    assert found.told(rows).batch([3, 2, 0, 1])["together"].tolist() == [False, True, True, False]
    assert found.of_trees([["b", "d"], ["b", "c"]]).tolist() == [False, True]
    everything = together_of(tables, [])
    assert everything.told(rows) is rows and everything.of_trees([["b"], ["d"]]).tolist() == [True, True]
    with pytest.raises(RecipeError, match="twins, of which there is no row") as refused:
        together_of(tables, ["twins", "agree"])
    assert "agree, twin" in refused.value.hint

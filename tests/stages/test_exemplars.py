"""build.exemplars over real folders: who is shown, what is recorded, and what must be there first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.features.table import open_features
from mmtune.features.units import text_id
from mmtune.recipe import Recipe
from mmtune.stages import build_data as build_stage
from mmtune.stages.evaluate import evaluate
from mmtune.stages.extract import extract
from mmtune.storage import read_manifest
from mmtune.talk import Talk
from tests.stages.colour_rows import (
    QUIET,
    SMALL,
    WORDS,
    built,
    make,
    media_of,
    pictures,
    retrieval,
    rows_of,
    texts,
)


def test_training_rows_show_the_nearest_of_other_pictures_and_held_out_rows_none(tmp_path: Path):
    sources = [pictures(tmp_path, "a", 12), pictures(tmp_path, "b", 9), pictures(tmp_path, "a", 3, "val")]
    recipe = make(tmp_path, sources, build=retrieval())
    rows = built(recipe)
    train = {row.id: row for row in rows if row.split == "train"}
    table = open_features(recipe.run_dir / "features", "image")
    vectors = table.pooled().astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in train.values():
        assert len(row.exemplar_ids) == 3 and row.id not in row.exemplar_ids
        *shown, own = media_of(row)
        assert own not in shown and all(train[name].source == row.source for name in row.exemplar_ids)
        # nearest_last: the similarity grows towards the question; what is not shown is no nearer.
        near = [float(vectors[table.row_of(path)] @ vectors[table.row_of(own)]) for path in shown]
        assert near == sorted(near)
        others = {media_of(other)[-1] for other in train.values() if other.source == row.source} - {own, *shown}
        assert max(float(vectors[table.row_of(path)] @ vectors[table.row_of(own)]) for path in others) <= near[0] + 1e-6
        assert [message.text for message in row.messages if message.role == "assistant"] == [
            *(train[name].messages[-1].text for name in row.exemplar_ids),
            row.references[0],
        ]
    assert not any(row.exemplar_ids for row in rows if row.split != "train")
    # The pictures are of three colours, and the nearest are of the same one.
    assert (
        np.mean([train[name].references == row.references for row in train.values() for name in row.exemplar_ids]) > 0.9
    )
    manifest = read_manifest(recipe.run_dir / "instructions")
    assert manifest.parents == {"features": read_manifest(recipe.run_dir / "features").hash}
    assert manifest.facts["exemplars"] == {
        "method": "retrieval",
        "order": "nearest_last",
        "by": ["image"],
        "pool": {"a": 24, "b": 18},
        "no_features": 0,
        "shots": {"3": 42},
    }


def test_rows_are_compared_by_their_kinds_reduced_and_never_by_joint_features(tmp_path: Path, tiny_vlm: Path):
    joined = {
        "modalities": ["image", "text"],
        "joint": ["image", "text"],
        "reduce": {"width": 3, "of": ["image", "joint"]},
    }
    recipe = make(
        tmp_path,
        [pictures(tmp_path, "box", 12), pictures(tmp_path, "box", 2, "val")],
        model={"path": str(tiny_vlm)},
        build=retrieval(),
        extract=joined,
    )
    train = [row for row in built(recipe) if row.split == "train"]
    manifest = read_manifest(recipe.run_dir / "instructions")
    assert open_features(recipe.run_dir / "features", "image").compared().shape == (14, 3)
    assert read_manifest(recipe.run_dir / "features").rows["joint"] == 28
    assert all(len(row.exemplar_ids) == 3 for row in train) and "joint" not in json.dumps(manifest.facts)


def test_the_output_is_the_same_for_any_number_of_workers(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build_stage, "CHUNK_ROWS", 16)
    monkeypatch.setattr(build_stage, "_INLINE_CHUNKS", 1)
    sources = [pictures(tmp_path, "a", 18), pictures(tmp_path, "b", 9)]
    more = retrieval(pool="all", balance=True, diversity=0.3, order="random")
    assert built(make(tmp_path, sources, "one", build=more)) == built(
        make(tmp_path, sources, "two", build={**more, "workers": 2})
    )


def test_exemplars_of_other_sources_keep_their_media_and_their_labels_words(tmp_path: Path):
    (tmp_path / "x").mkdir()
    words = {"red": "rot", "blue": "blau", "green": "gruen"}
    sources = [pictures(tmp_path, "a", 6), pictures(tmp_path / "x", "b", 6, verbalizer=words)]
    rows = built(make(tmp_path, sources, build=retrieval(pool=["b"])))
    assert {name.partition("/")[0] for row in rows for name in row.exemplar_ids} == {"b"}
    for row in rows:
        assert all(path.startswith("x/media/") for path in media_of(row)[:-1])
        assert {message.text for message in row.messages if message.role == "assistant" and not message.train} <= set(
            words.values()
        )
    assert all((tmp_path / path).is_file() for row in rows for path in media_of(row))


def test_balance_and_a_held_out_cluster(tmp_path: Path):
    sources = [pictures(tmp_path, "a", 12, per_picture=1), pictures(tmp_path, "b", 9, per_picture=1)]
    mixture = {"shots": {3: 0.5}, "hold_out": ["b"]}
    recipe = make(
        tmp_path,
        sources,
        build={"mixture": mixture, "exemplars": {"method": "retrieval", "balance": True, "pool": "all"}},
    )
    rows = built(recipe)
    assert {row.source for row in rows} == {"a"} and {len(row.exemplar_ids) for row in rows} == {0, 3}
    for row in rows:
        assert all(name.startswith("a/") for name in row.exemplar_ids)
        answers = {message.text for message in row.messages if message.role == "assistant" and not message.train}
        assert not row.exemplar_ids or answers == set(WORDS)
    with pytest.raises(RecipeError, match="gives no training row"):
        built(
            make(
                tmp_path, sources, "other", build={"mixture": mixture, "exemplars": {"method": "random", "pool": ["b"]}}
            )
        )


def test_random_exemplars_without_a_mixture(tmp_path: Path):
    sources = [pictures(tmp_path, "a", 12)]
    recipe = make(tmp_path, sources, build={"exemplars": {"k": 3, "balance": True}})
    build_stage.build_data(recipe, console=QUIET)
    rows = rows_of(recipe)
    assert all(len(row.exemplar_ids) == 3 and media_of(row)[-1] not in media_of(row)[:-1] for row in rows)
    shown = [
        {message.text for message in row.messages if message.role == "assistant" and not message.train} for row in rows
    ]
    assert all(answers == set(WORDS) for answers in shown)
    assert read_manifest(recipe.run_dir / "instructions").parents == {}


def copied(folder: Path, entry: dict, other: dict) -> dict[str, str]:
    """Copies every picture of one source over the other source's of the same number; returns each copy's original."""
    files = {}
    for at in range(len({json.loads(line)["i"] for line in Path(other["path"]).read_text().splitlines()})):
        names = [f"{one['id']}-{one['split']}-{at}.png" for one in (entry, other)]
        shutil.copy(folder / "media" / names[0], folder / "media" / names[1])
        files[f"media/{names[1]}"] = f"media/{names[0]}"
    return files


@pytest.mark.parametrize("settings", [{"method": "retrieval"}, {"method": "random"}], ids=["retrieval", "random"])
def test_a_copy_of_a_picture_under_another_name_is_the_same_picture(tmp_path: Path, settings: dict, tiny_vlm: Path):
    sources = [pictures(tmp_path, "a", 6), pictures(tmp_path, "b", 6), pictures(tmp_path, "a", 6, "val")]
    originals = copied(tmp_path, sources[0], sources[1]) | copied(tmp_path, sources[0], sources[2])
    asked = {"compare": ["base"], "shots": [4], "exemplars": [{**settings, "pool": "all"}], "bootstrap": 100}
    recipe = make(
        tmp_path,
        sources,
        model={"path": str(tiny_vlm)},
        build={"exemplars": {**settings, "k": 4, "pool": "all"}},
        eval={**asked, "max_new_tokens": 2, "loss": False},
        tokenize={"max_length": 1024, "workers": 1},
    )
    rows = built(recipe)
    own = {row.id: f"media/{media_of(row)[-1].rpartition('/')[2]}" for row in rows}
    picture = {name: originals.get(path, path) for name, path in own.items()}
    assert len(set(picture.values())) == 6
    for row in (row for row in rows if row.split == "train"):
        assert len(row.exemplar_ids) == 4
        assert picture[row.id] not in {picture[name] for name in row.exemplar_ids}
    evaluate(recipe, console=QUIET)
    lines = [json.loads(line) for line in (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()]
    shown = [line for line in lines if line.get("exemplar_ids")]
    assert len(shown) >= 12
    for line in shown:
        assert picture[line["id"]] not in {picture[name] for name in line["exemplar_ids"]}


def test_features_that_are_missing_or_changed(tmp_path: Path):
    sources = [pictures(tmp_path, "a", 6)]
    recipe = make(tmp_path, sources, build=retrieval(by=["image"]))
    with pytest.raises(DataError) as missing:
        built(recipe, again=False)
    assert missing.value.hint == "run: mmtune extract"
    built(recipe)
    assert build_stage.build_data(recipe, console=QUIET)["cached"]
    pooled = {"encoders": {"image": {"config": SMALL, "pool": "mean"}}}
    changed, talk = make(tmp_path, sources, build=retrieval(by=["image"]), extract=pooled), Talk(quiet=True)
    extract(changed, console=QUIET)
    assert not build_stage.build_data(changed, console=talk)["cached"]
    assert any("parents.features" in line for line in talk.lines)
    more = make(tmp_path, [pictures(tmp_path, "a", 8)], build=retrieval(by=["image"]))
    with pytest.raises(DataError, match="made of other rows") as stale:
        built(more, again=False)
    with pytest.raises(RecipeError, match="asks for text") as kind:
        built(make(tmp_path, sources, build=retrieval(by=["text"])), again=False)
    (tmp_path / "elsewhere").mkdir()
    moved = make(tmp_path, [pictures(tmp_path / "elsewhere", "a", 6)], build=retrieval(by=["image"]))
    with pytest.raises(IntegrityError) as elsewhere:
        built(moved, again=False)
    assert (stale.value.code, kind.value.code) == ("features_stale", "features_missing")
    assert all("mmtune extract" in error.value.hint for error in (stale, kind, elsewhere))


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_the_index_of_extract_is_the_one_that_is_searched(kind: str, tmp_path: Path):
    pytest.importorskip("faiss")
    sources = [pictures(tmp_path, "a", 30, per_picture=1)]
    exact = built(make(tmp_path, sources, "exact", build=retrieval()))
    other = built(make(tmp_path, sources, kind, build=retrieval(), extract={"index": {"kind": kind}}))
    same = np.mean([one.exemplar_ids == two.exemplar_ids for one, two in zip(exact, other, strict=True)])
    assert same == 1 if kind == "flat" else same > 0.5


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ({"exemplars": {"method": "random", "by": ["image"]}}, "by is for method retrieval"),
        ({"exemplars": {"method": "retrieval", "by": ["image", "image"]}}, "one kind twice"),
        ({"exemplars": {"pool": []}}, "names no source"),
        ({"exemplars": {"k": 2}, "mixture": {"shots": {2: 0.5}}}, "leave exemplars.k out"),
    ],
)
def test_settings_that_contradict_are_refused(build: dict, said: str):
    with pytest.raises(ValueError, match=said):
        Recipe(run_dir="x", build=build)
    with pytest.raises(ValueError, match="set shots"):
        Recipe(run_dir="x", eval={"exemplars": {"method": "random"}})


def test_texts_are_compared_by_the_base_models_own_states_and_never_shown_twice(tmp_path: Path, tiny_vlm: Path):
    recipe = make(
        tmp_path,
        [texts(tmp_path, 20, "train")],
        model={"path": str(tiny_vlm)},
        extract={"modalities": ["text"], "encoders": {"text": "base"}},
        build=retrieval(by=["text"]),
    )
    rows = {row.id: row for row in built(recipe)}
    table = open_features(recipe.run_dir / "features", "text")
    named = make(
        tmp_path,
        recipe.model_dump()["sources"],
        "named",
        extract={"modalities": ["text"], "encoders": {"text": str(tiny_vlm)}},
    )
    extract(named, console=QUIET)
    np.testing.assert_array_equal(table.pooled(), open_features(named.run_dir / "features", "text").pooled())
    twins = [row for row in rows.values() if sum(row.feature_ids == other.feature_ids for other in rows.values()) == 2]
    assert len(twins) == 2 and all(len(row.exemplar_ids) == 3 for row in rows.values())
    for row in rows.values():
        assert table.row_of(row.feature_ids[0].removeprefix("text/")) is not None
        assert all(rows[name].feature_ids != row.feature_ids for name in row.exemplar_ids)
    assert twins[0].feature_ids == ("text/" + text_id("is red number 0 fine"),)

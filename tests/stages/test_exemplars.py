"""build.exemplars and eval.shots over real folders: who is shown, what is recorded, and what must be there first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtune.errors import DataError, IntegrityError, RecipeError
from mmtune.features.table import open_features
from mmtune.features.units import text_id
from mmtune.prompts.schema import row_to_example
from mmtune.recipe import Recipe
from mmtune.records import Example
from mmtune.stages import build_data as build_stage
from mmtune.stages.evaluate import evaluate
from mmtune.stages.extract import extract
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk

QUIET = Talk(quiet=True)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
WORDS = ("red", "blue", "green")
COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 200, 30)}


def pictures(folder: Path, name: str, count: int, split: str = "train", per_picture: int = 2, **more) -> dict:
    """Writes pictures of one colour each, asked about several times, and returns the recipe's entry."""
    rows = []
    for at in range(count):
        word = WORDS[at % len(WORDS)]
        file = f"{name}-{split}-{at}.png"
        (folder / "media").mkdir(exist_ok=True)
        dice = np.random.default_rng([at, len(name), ord(split[0])])
        noise = dice.integers(-25, 25, (24, 24, 3))
        Image.fromarray((np.array(COLORS[word]) + noise).clip(0, 255).astype(np.uint8)).save(folder / "media" / file)
        rows += [{"i": file, "q": f"what color is {name} {at}, time {time}", "a": word} for time in range(per_picture)]
    path = folder / f"{name}-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "q", "answer": "a", "image": "i"}
    entry = {"id": name, "reader": "table", "split": split, "path": str(path), "images": str(folder / "media")}
    return {**entry, "columns": columns, "template": "vqa_plain", **more}


def make(folder: Path, sources: list[dict], run: str = "run", **sections) -> Recipe:
    build = {"workers": 1, **sections.pop("build", {})}
    settings = {"modalities": ["image"], "encoders": {"image": {"config": SMALL, "pool": "stats"}}, "workers": 1}
    settings |= sections.pop("extract", {})
    return Recipe(run_dir=folder / run, sources=sources, build=build, extract=settings, **sections)


def built(recipe: Recipe, *, again: bool = True) -> list[Example]:
    if again:
        extract(recipe, console=QUIET)
    build_stage.build_data(recipe, console=QUIET)
    return rows_of(recipe)


def rows_of(recipe: Recipe) -> list[Example]:
    folder = recipe.run_dir / "instructions"
    splits = [split for split in ("train", "val", "test") if (folder / split).is_dir()]
    return [row_to_example(row) for split in splits for row in open_split(folder / split).to_pylist()]


def retrieval(**more) -> dict:
    return {"exemplars": {"method": "retrieval", "k": 3, **more}}


def media_of(example: Example) -> list[str]:
    return [medium.path for medium in example.media]


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


def texts(folder: Path, count: int, split: str) -> dict:
    """Writes texts without media, one of them twice, and returns the recipe's entry."""
    rows = [{"q": f"is {WORDS[at % 3]} number {at // 2 * 2} fine", "a": ("yes", "no")[at % 2]} for at in range(count)]
    rows.append({**rows[0], "a": "no"})
    path = folder / f"t-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"text": "q", "answer": "a", "options": "=yes|no"}
    return {
        "id": "t",
        "reader": "table",
        "split": split,
        "path": str(path),
        "columns": columns,
        "task": "sentiment_analysis",
    }


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


def few_shot(tmp_path: Path, tiny_vlm: Path, **settings) -> Recipe:
    sources = [pictures(tmp_path, "a", 12), pictures(tmp_path, "a", 4, "val"), pictures(tmp_path, "b", 3, "val")]
    return make(
        tmp_path,
        sources,
        model={"path": str(tiny_vlm)},
        extract={"encoders": {"image": "base"}},
        build=retrieval(),
        **settings,
    )


def test_a_full_context_loses_its_farthest_exemplars_and_says_how_many(tmp_path: Path, tiny_vlm: Path):
    recipe = few_shot(tmp_path, tiny_vlm, tokenize={"max_length": 512, "workers": 1})
    built(recipe)
    assert tokenize(recipe, console=QUIET)["drops"] == {}
    whole = {row["example_ids"][0]: row for row in open_split(recipe.run_dir / "tokens" / "train").to_pylist()}
    longest = max(row["length"] for row in whole.values())
    assert read_manifest(recipe.run_dir / "tokens").facts["exemplars_dropped"] == 0
    short = few_shot(tmp_path, tiny_vlm, tokenize={"max_length": longest // 2, "workers": 1, "layout": "rows"})
    talk = Talk(quiet=True)
    assert tokenize(short, console=talk)["drops"] == {}
    facts = read_manifest(short.run_dir / "tokens").facts
    rows = open_split(short.run_dir / "tokens" / "train").to_pylist()
    examples = {row.id: row for row in rows_of(short)}
    dropped = [len(examples[row["example_ids"][0]].media) - len(row["media"]) for row in rows]
    assert facts["exemplars_dropped"] == sum(dropped) > 0 and facts["rows_with_fewer"] == len([n for n in dropped if n])
    for row, number in zip(rows, dropped, strict=True):
        assert row["length"] <= longest // 2
        # nearest_last: the farthest stand first.
        assert [medium["path"] for medium in row["media"]] == media_of(examples[row["example_ids"][0]])[number:]
    assert any("did not fit" in line for line in talk.lines)


def test_eval_asks_the_same_rows_with_and_without_exemplars(tmp_path: Path, tiny_vlm: Path):
    settings = {
        "compare": ["base"],
        "shots": [0, 2],
        "exemplars": [{"method": "random"}, {"method": "retrieval", "by": ["image"]}],
        "bootstrap": 100,
        "max_new_tokens": 4,
    }
    recipe = few_shot(tmp_path, tiny_vlm, eval=settings, tokenize={"max_length": 512, "workers": 1})
    train = {row.id: row for row in built(recipe) if row.split == "train"}
    talk = Talk(quiet=True)
    evaluate(recipe, console=talk)
    assert "2 random: 6 of 14 rows have fewer than 2 exemplars" in talk.lines
    report = json.loads((recipe.run_dir / "report" / "metrics.json").read_text())
    lines = [json.loads(line) for line in (recipe.run_dir / "report" / "predictions.jsonl").read_text().splitlines()]
    names = ["vote, 2 retrieval", "base", "base, 2 random", "base, 2 retrieval"]
    assert report["run"]["compare"] == names == list(report["metrics"]["exact_match"]["models"])
    assert list(report["perplexity"]["models"]) == names[1:]
    # Whom the exemplars would vote for is shown, and is no system that another one is compared with.
    pairs = [(one["first"], one["second"]) for one in report["metrics"]["exact_match"]["steps"]]
    assert pairs == [(names[1], names[2]), (names[1], names[3]), (names[2], names[3])]
    assert report["run"]["pair"] == list(pairs[-1])
    assert read_manifest(recipe.run_dir / "report").parents.keys() == {"instructions", "features"}
    by_way = {name: {line["id"]: line for line in lines if line["model"] == name} for name in names}
    assert len({frozenset(found) for found in by_way.values()}) == 1 and len(by_way["base"]) == 14
    for name, found in by_way.items():
        for line in found.values():
            shown = line.get("exemplar_ids", [])
            # b has no training rows, so nothing of its own to show.
            assert len(shown) == (0 if name == "base" or line["source"] == "b" else 2)
            assert all(one in train for one in shown)
    for line in by_way["vote, 2 retrieval"].values():
        answers = [train[one].references[0] for one in line["exemplar_ids"]]
        assert line["prediction"] == ("" if not answers else answers[-1] if len(set(answers)) > 1 else answers[0])
    assert [(one["name"], one["shown"], one["rows_with_fewer_found"]) for one in report["exemplars"]] == [
        ("2 random", 16, 6),
        ("2 retrieval", 16, 6),
    ]
    said = (recipe.run_dir / "report" / "report.md").read_text()
    assert "2 retrieval: 16 exemplars before 14 questions" in said and "for 6 rows the pool has fewer than 2" in said


def test_few_shot_prompts_hold_the_exemplars_media_and_fit(tmp_path: Path, tiny_vlm: Path):
    from mmtune.encoding.processor import load_processor
    from mmtune.encoding.render import Renderer
    from mmtune.evaluation.rows import EvalRows
    from mmtune.stages.evaluate.shots import asked_rows

    settings = {"compare": ["base"], "shots": 3, "exemplars": {"method": "retrieval"}}
    recipe = few_shot(tmp_path, tiny_vlm, eval=settings)
    examples = [row for row in built(recipe) if row.split == "val" and row.source == "a"]
    renderer = Renderer(load_processor(str(tiny_vlm), offline=True))

    def ask(max_length: int):
        def rows(count, example, ranks=None):
            more = {} if ranks is None else {"ranks": ranks}
            return EvalRows(count, example, renderer, max_length=max_length, **more)

        plain = rows(len(examples), lambda at: examples[at])
        list(plain.examine())
        assert recipe.eval is not None
        manifests = [read_manifest(recipe.run_dir / name) for name in ("instructions", "features")]
        return plain, asked_rows(recipe, recipe.eval, plain, rows, *manifests)

    plain, asked = ask(512)
    few = asked.rows["3 retrieval"]
    for at in range(len(examples)):
        assert len(few.prompts([at])[0].media) == 4 and len(plain.prompts([at])[0].media) == 1
        assert few.example(at).references == examples[at].references
    _, short = ask(max(few.row_sizes) // 2)
    shorter = short.rows["3 retrieval"]
    assert len(shorter.kept) == len(examples) and max(shorter.row_sizes) <= max(few.row_sizes) // 2
    assert short.facts[0]["dropped"] == sum(shorter.dropped) > 0
    for at in range(len(examples)):
        left = [span.medium.path for span in shorter.prompts([at])[0].media]
        assert left == media_of(few.example(at))[-len(left) :] == media_of(shorter.example(at))
        assert shorter.example(at).exemplar_ids == few.example(at).exemplar_ids[4 - len(left) :]


def test_shots_without_training_rows_say_so(tmp_path: Path, tiny_vlm: Path):
    sources = [pictures(tmp_path, "a", 3, "val")]
    recipe = make(tmp_path, sources, model={"path": str(tiny_vlm)}, eval={"compare": ["base"], "shots": 2})
    build_stage.build_data(recipe, console=QUIET)
    with pytest.raises(DataError, match="instructions/ has none") as error:
        evaluate(recipe, console=QUIET)
    assert error.value.code == "no_exemplars"


def test_a_pool_without_rows_is_no_zero_shot_by_another_name(tmp_path: Path, tiny_vlm: Path):
    sources = [pictures(tmp_path, "a", 6), pictures(tmp_path, "b", 3, "val")]
    settings = {"compare": ["base"], "shots": [0, 2], "bootstrap": 100, "max_new_tokens": 2, "loss": False}

    def recipe(run: str, build: dict, exemplars: list[dict]) -> Recipe:
        models = {"model": {"path": str(tiny_vlm)}, "extract": {"encoders": {"image": "base"}}}
        return make(tmp_path, sources, run, build=build, eval={**settings, "exemplars": exemplars}, **models)

    ways = [{"method": "random"}, {"method": "retrieval", "by": ["image"]}]
    own = recipe("own", {}, ways)
    built(own)
    for way, method in zip(ways, ("random", "retrieval"), strict=True):
        with pytest.raises(
            RecipeError, match=rf"no row has an exemplar \(2 {method}\); .*pool is own, rows are of b"
        ) as error:
            evaluate(recipe("own", {}, [way]), console=QUIET)
        assert "are of a: set eval.exemplars.pool" in error.value.hint
    # The pool of the training rows is that of eval, unless it names one.
    opened = recipe("all", {"exemplars": {"pool": ["a"], "k": 1}}, ways)
    built(opened)
    evaluate(opened, console=QUIET)
    report = json.loads((opened.run_dir / "report" / "metrics.json").read_text())
    assert [(one["pool"], one["shown"]) for one in report["exemplars"]] == [(["a"], 12), (["a"], 12)]
    closed = recipe("all", {"exemplars": {"pool": ["a"], "k": 1}}, [{"pool": "own"}])
    with pytest.raises(RecipeError, match="pool is own"):
        evaluate(closed, console=QUIET)

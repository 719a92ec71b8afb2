"""eval.shots over real folders: the same rows with and without exemplars, which fit or are said to be left out."""

import json
from pathlib import Path

import pytest

from mmtune.errors import DataError, RecipeError
from mmtune.recipe import Eval, Recipe
from mmtune.stages import build_data as build_stage
from mmtune.stages.evaluate import evaluate
from mmtune.stages.evaluate.shots import ways_of
from mmtune.stages.tokenize import tokenize
from mmtune.storage import open_split, read_manifest
from mmtune.talk import Talk
from tests.stages.colour_rows import (
    QUIET,
    built,
    make,
    media_of,
    pictures,
    retrieval,
    rows_of,
)


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


def test_shots_of_conversations_alone_say_why_none_can_be_shown(tmp_path: Path, tiny_vlm: Path):
    turns = [{"role": "user", "content": "Which color?"}, {"role": "assistant", "content": "red"}]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"id": str(at), "messages": turns}) + "\n" for at in range(6)))
    entry = {"reader": "messages", "path": str(path)}
    sources = [{**entry, "id": split, "split": split} for split in ("train", "val")]
    recipe = make(tmp_path, sources, model={"path": str(tiny_vlm)}, eval={"compare": ["base"], "shots": [0, 2]})
    build_stage.build_data(recipe, console=QUIET)
    with pytest.raises(DataError, match=r"no training row can be an exemplar: a conversation as it was read, .*\(6\)"):
        evaluate(recipe, console=QUIET)


def test_ways_of_one_method_are_named_by_what_tells_them_apart():
    ways = [
        {"method": "random"},
        {"method": "retrieval"},
        {"method": "retrieval", "by": ["image", "text"], "balance": True},
        {"method": "retrieval", "by": ["text"], "diversity": 0.5},
        {"method": "retrieval", "by": ["text"], "order": "random"},
    ]
    found = [way.name for way in ways_of(Eval(shots=[0, 3], exemplars=ways))]
    assert found == [
        "",
        "3 random",
        "3 retrieval nearest last",
        "3 retrieval by image and text nearest last balance",
        "3 retrieval by text nearest last diversity 0.5",
        "3 retrieval by text random",
    ]
    assert [way.name for way in ways_of(Eval(shots=3, exemplars=ways[:2]))] == ["3 random", "3 retrieval"]
    pools = [{"pool": "own"}, {"pool": ["a", "b"]}]
    assert [way.name for way in ways_of(Eval(shots=1, exemplars=pools))] == ["1 random pool own", "1 random pool a+b"]

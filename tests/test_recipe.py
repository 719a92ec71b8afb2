"""Recipes are strict: a mistake is one line with the key, the line and the next step."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmtune.errors import RecipeError
from mmtune.recipe.elsewhere import ELSEWHERE, NEEDLESS
from mmtune.recipe.text import load_recipe
from mmtune.stages.keys import list_keys


def write(folder, text, name="r.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def load(folder, text, overrides=(), environ=None):
    return load_recipe(write(folder, text), overrides, environ or {})


def test_floats_and_words_keep_their_meaning(tmp_path):
    recipe = load(
        tmp_path, "run_dir: x\nfinetune: {learning_rate: 1e-4}\nsources: [{id: no, reader: hf, path: a/b, name: 'on'}]"
    )
    assert recipe.finetune.learning_rate == 1e-4
    assert recipe.sources[0].id == "no"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "run_dir: x\nfinetune:\n  learnin_rate: 1\n",
            "line 3: unknown key `finetune.learnin_rate`; did you mean `learning_rate`?",
        ),
        ("run_dir: x\nfinetun: {}\n", "did you mean `finetune`?"),
        ("run_dir: x\nrun_dir: y\n", "appears twice"),
        ("run_dir: x\nfinetune: {epochs: soon}\n", "valid number"),
        ("run_dir: x\nfinetune: {learning_rate: 0}\n", "greater than 0"),
        ("run_dir: x\nfinetune: {engine: deepspeed}\n", "goes with shard zero2 or zero3"),
        ("run_dir: x\nfinetune: {engine: deepspeed, shard: zero3, method: prompt}\n", "does not go with method prompt"),
        ("run_dir: x\nfinetune: {offload: true, optimizer: muon}\n", "shard and offload do not go with"),
        ("run_dir: x\nfinetune: {features: {use: on}, augment: {shift: 0.1}}\n", "which augment changes"),
        ("run_dir: x\nfinetune: {features: {use: on}, train: [llm, vision]}\n", "train names vision: set it to auto"),
        ("run_dir: x\nfinetune: {train: []}\n", "at least one tower"),
        ("run_dir: x\nfinetune: {lora: {r: 0}}\n", "greater than or equal to 1"),
        ("run_dir: [x\n", "not valid YAML"),
        ("a: &b 1\nrun_dir: *b\n", "aliases"),
        ("run_dir: !!python/object/apply:os.system ['true']\n", "tags"),
        ("run_dir: x\nseed: !!int soon\n", "r.yaml:2: YAML tags"),
        ("run_dir: x\nseed: true\n", "line 2: `seed`: input should not be true or false (found True)"),
        ("run_dir: x\nfinetune: {epochs: .inf}\n", "`finetune.epochs`: input should be a finite number (found inf)"),
        ("run_dir: x\nfinetune: {task_weights: {vqa: .nan}}\n", "input should be a finite number (found nan)"),
        ("run_dir: x\nfinetune: {train: llm}\n", "`finetune.train`: input should be a list (found 'llm')"),
        ("run_dir: x\nfinetune: {lora: {r: true}}\n", "`finetune.lora.r`: input should not be true or false"),
        ("just words", "not a recipe"),
        ("model: {path: m}\n", "`run_dir` is required"),
        ("run_dir: x\nsources: [{id: a/b, reader: llava}]\n", "pattern"),
        ("run_dir: x\nsources: [{id: a, reader: llava}, {id: a, reader: llava}]\n", "two sources"),
    ],
)
def test_mistakes_are_named(tmp_path, text, expected):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert expected in caught.value.message
    assert caught.value.hint


BUILT = (
    "run_dir: x\npretrain: {build: {text: a, encoders: {image: b}, fusion: {mode: %s}}}\nfinetune: {train: [llm, %s]}\n"
)


@pytest.mark.parametrize(("mode", "tower", "has"), [("early", "fusion", False), ("late", "fusion", True),
                                                    ("late", "audio", False), ("early", "vision", True)])  # fmt: skip
def test_what_tunes_a_model_that_is_made_first_is_known_before(tmp_path, mode, tower, has):
    if has:
        assert load(tmp_path, BUILT % (mode, tower)).finetune.train == ("llm", tower)
        return
    with pytest.raises(
        RecipeError, match=f"finetune.train names the tower {tower}, which pretrain.build does not make"
    ):
        load(tmp_path, BUILT % (mode, tower))


def test_the_model_that_is_made_first_has_settings_too(tmp_path):
    made = load(tmp_path, BUILT % ("late", "fusion"), ["model.attn=sdpa"])
    assert made.model.attn == "sdpa" and made.model.path == str(tmp_path / "x" / "base")
    with pytest.raises(RecipeError, match=r"leave out model\.path, or pretrain"):
        load(tmp_path, BUILT % ("late", "fusion"), ["model.path=other"])


def test_a_value_from_elsewhere_is_named_by_where_it_comes_from(tmp_path):
    text = "run_dir: x\nfinetune:\n  epochs: 1\n"
    with pytest.raises(RecipeError, match=r": --set finetune.epochs: `finetune.epochs`: "):
        load(tmp_path, text, ["finetune.epochs=soon"])
    with pytest.raises(RecipeError, match=r": the environment's MMTUNE_FINETUNE__EPOCHS: `finetune.epochs`: "):
        load(tmp_path, text, environ={"MMTUNE_FINETUNE__EPOCHS": "-1"})
    with pytest.raises(RecipeError, match=r"--set finetune.lora.z: unknown key `finetune.lora.z`") as error:
        load(tmp_path, text, ["finetune.lora.z=1"])
    assert error.value.hint.startswith("mend what was given beside the recipe"), "the recipe itself is sound"
    with pytest.raises(RecipeError, match=r"finetune.lora.z.*epocs") as error:
        load(tmp_path, text + "  epocs: 1\n", ["finetune.lora.z=1"])
    assert error.value.hint.startswith("mend the recipe")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=!!timestamp x", "--set seed: '!!timestamp x' is not a YAML value"),
        ("seed=" + "[" * 5000, "is not a YAML value"),
        ("extends=other.yaml", "--set extends: `extends` stands in the recipe's file alone"),
    ],
)
def test_what_may_not_be_set_is_told(tmp_path, override, said):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "run_dir: x\n", [override])
    assert said in caught.value.message and len(caught.value.message) < 200


def test_problems_name_keys_and_not_types(tmp_path):
    text = "run_dir: x\npretrain: {build: {text: a, encoders: {image: b}}, train: most, objectives: {zork: 1}}\n"
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text)
    assert "`pretrain.train`" in caught.value.message and "`pretrain.objectives.zork`" in caught.value.message
    assert "[" not in caught.value.message.replace(str(tmp_path), "")


def test_precedence(tmp_path):
    write(tmp_path, "run_dir: x\nseed: 1\nfinetune: {epochs: 1, accumulate: 2}\n", "base.yaml")
    text = "extends: base.yaml\nfinetune: {epochs: 2}\n"
    assert load(tmp_path, text).finetune.epochs == 2
    assert load(tmp_path, text).finetune.accumulate == 2
    environ = {"MMTUNE_FINETUNE__EPOCHS": "3"}
    assert load(tmp_path, text, environ=environ).finetune.epochs == 3
    assert load(tmp_path, text, ["finetune.epochs=4"], environ).finetune.epochs == 4


@pytest.mark.parametrize("key", ["run_dir: loop", "run_dir: r\nsources: [{id: a, reader: table, path: loop/x.csv}]"])
def test_a_path_through_a_loop_of_links_is_refused(tmp_path, key):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RecipeError, match="no path that can be followed"):
        load_recipe(write(tmp_path, key), environ={})


def test_a_recipe_below_a_name_that_is_not_utf8_is_refused(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    with pytest.raises(RecipeError, match="no path that can be followed") as caught:
        load(folder, "run_dir: x\n")
    caught.value.hint.encode("utf-8")


def test_extends_in_a_circle_is_refused(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "a.yaml", (), {})


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "model").mkdir()
    text = "run_dir: runs/x\nmodel: {path: model}\nsources: [{id: a, reader: llava, path: d/a.json, images: d}]\n"
    recipe = load(tmp_path, text)
    assert recipe.run_dir == tmp_path / "runs" / "x"
    assert recipe.model.path == str(tmp_path / "model")
    assert recipe.sources[0].path == str(tmp_path / "d" / "a.json")
    assert load(tmp_path, "run_dir: x\nmodel: {path: Qwen/Qwen2.5-VL-3B-Instruct}\n").model.path.startswith("Qwen/")


@pytest.mark.parametrize("override", ["finetune", "=1", "a..b=1", "finetune.epochs=[", "finetune.nokey=1", "seed=abc"])
def test_bad_overrides_are_refused(tmp_path, override):
    with pytest.raises(RecipeError):
        load(tmp_path, "run_dir: x\n", [override])


@given(st.text(max_size=60))
def test_no_text_makes_a_traceback(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(path, (), {})


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("finetune", {"from_scratch": True}),
        ("eval", {"compare": []}),
        ("eval", {"compare": ["base", "base"]}),
        ("eval", {"metrics": []}),
    ],
)
def test_settings_that_could_only_mislead_are_refused(section: str, settings: dict[str, object]) -> None:
    from mmtune.recipe import Eval, Finetune

    with pytest.raises(ValueError, match=r"method full|at least one|named twice"):
        {"finetune": Finetune, "eval": Eval}[section].model_validate(settings)


def test_a_section_that_is_no_section_is_told_its_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("run_dir: r\nextract: {index: exact}\n")
    with pytest.raises(
        RecipeError, match=r"line 2: `extract.index`: expected keys of its own: .*kind, .*\(found 'exact'\)"
    ):
        load_recipe(path, environ={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("finetune: {lora_rank: 8}", "unknown key `finetune.lora_rank`; that is `finetune.lora.r` here"),
        ("finetune: {lora: {rank: 8}}", "unknown key `finetune.lora.rank`; that is `r` here"),
        ("finetune: {neat_packing: true}", "`finetune.neat_packing`; rows are packed wherever it is exact"),
        ("lora_rank: 8", "unknown key `lora_rank`; that is `finetune.lora.r` here"),
        ("pretrain: {build: {text: a}, num_train_epochs: 1}", "that is `epochs` here"),
        ("finetune: {max_length: 8}", "unknown key `finetune.max_length`; there is `tokenize.max_length`"),
        ("learning_rate: 1", "there is `pretrain.learning_rate` and `finetune.learning_rate`"),
        ("sources: [{id: a, reader: llava, strip: /x/}]", "`sources.0.strip`; there is `sources[].columns.strip`"),
        ("model: {paths: 8}", "did you mean `path`?"),
        ("template: qwen2_vl", "unknown key `template`; the chat template is the model's own; `sources[].template` is"),
        ("export_dir: merged", "unknown key `export_dir`; mmtune export writes exported/ below `run_dir`"),
        ("merge_lora: true", "that is `export` here"),
        ("finetune: {packing: true}", "unknown key `finetune.packing`; rows are packed wherever it is exact"),
    ],
)
def test_keys_of_other_trainers_and_other_sections_are_told_by_name(tmp_path, text, expected):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"run_dir: x\n{text}\n")
    assert expected in caught.value.message


def test_what_other_trainers_keys_are_called_here_exists():
    keys = {key.path for key in list_keys()}
    heads = {path.partition(".")[0].partition("[")[0] for path in keys}
    assert set(ELSEWHERE.values()) <= keys | heads and not set(ELSEWHERE) & set(NEEDLESS)
    assert not set(ELSEWHERE) & heads, "a section of a recipe is no key of others"


def test_known_keys_are_listed_once(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, "run_dir: x\nfinetune: {xxxx: 1, yyyy: 2}\nzzzz: 3\n")
    told = caught.value.message
    assert told.count("known keys: accumulate, ") == 1 and told.count("known keys: build, ") == 1
    assert all(f"unknown key `{name}`" in told for name in ("finetune.xxxx", "finetune.yyyy", "zzzz"))

"""The reference of recipe keys says what the schema says: every key, its default, its meaning."""

import jsonschema
import pytest
import yaml

from mmtune.errors import RecipeError
from mmtune.recipe import Finetune, Recipe
from mmtune.stages.keys import list_keys, render, schema


def fields(model, prefix=""):
    """Every leaf of a section, by walking pydantic's own fields."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        parts = [inner, *getattr(inner, "__args__", ())]
        section = next((p for p in parts if isinstance(p, type) and hasattr(p, "model_fields")), None)
        if getattr(inner, "__origin__", None) is dict:
            # A mapping is one key, whatever it holds.
            section = None
        many = "[]" if getattr(inner, "__origin__", None) is tuple else ""
        if section is None:
            yield f"{prefix}{name}", field
        else:
            yield from fields(section, f"{prefix}{name}{many}.")


def test_every_key_of_the_schema_stands_there_with_its_meaning():
    keys = {key.path: key for key in list_keys()}
    assert set(keys) == {path for path, _ in fields(Recipe)}
    assert all(key.about for key in keys.values())
    assert {path for path, key in keys.items() if key.default is None} == {
        path for path, field in fields(Recipe) if field.is_required()
    }


def test_a_section_and_a_single_key():
    assert [key.path for key in list_keys("finetune.lora")][:2] == ["finetune.lora.r", "finetune.lora.alpha"]
    (key,) = list_keys("finetune.learning_rate")
    assert key.default == str(Finetune().learning_rate) and "> 0" in key.kind
    assert "learning_rate" in render([key])
    assert list_keys("model.path")[0].default is None and list_keys("sources.reader")[0].default is None


@pytest.mark.parametrize(
    ("word", "paths"),
    [
        ("learning_rate", {"finetune.learning_rate", "pretrain.learning_rate", "finetune.soft_prompt.learning_rate"}),
        ("lora", {"finetune.lora.r", "finetune.lora.alpha"}),
        ("num_train_epochs", {"finetune.epochs"}),
        ("media_dir", {"sources.images"}),
        ("pixels", {"tokenize.max_image_pixels", "build.max_image_pixels"}),
    ],
)
def test_a_word_finds_the_keys_that_have_it_or_are_called_so_elsewhere(word, paths):
    found = {key.path for key in list_keys(word)}
    assert paths <= found and len(found) < 20


def test_a_word_that_needs_no_key_says_why():
    with pytest.raises(RecipeError) as error:
        list_keys("packing")
    assert error.value.hint == "rows are packed wherever it is exact"


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(RecipeError) as error:
        list_keys("finetune.lorra")
    assert error.value.hint == "did you mean lora?"
    assert error.value.message == "a recipe has no key 'finetune.lorra': there is no 'lorra' in finetune"
    with pytest.raises(RecipeError) as error:
        list_keys("nosuch")
    assert error.value.message == "a recipe has no key 'nosuch'"


def test_the_schema_accepts_a_recipe_and_refuses_an_unknown_key():
    recipe = yaml.safe_load("{run_dir: r, model: {path: m}, finetune: {lora: {r: 4}, train: [llm]}}")
    jsonschema.validate(recipe, schema())
    with pytest.raises(jsonschema.ValidationError, match="lorra"):
        jsonschema.validate({**recipe, "finetune": {"lorra": {}}}, schema())
    jsonschema.validate({"r": 4}, schema("finetune.lora"))

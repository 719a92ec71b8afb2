"""Virtual tokens started from a text are that text, and train beside LoRA; each is saved as an adapter of its own."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from course import Rows, run, tiny_model

from mmtune.errors import RecipeError
from mmtune.models.adapter import save_tuned
from mmtune.models.load import load_model, load_tuned
from mmtune.models.method import with_method
from mmtune.models.soft_prompt import lora_beside, virtual_tokens
from mmtune.models.towers import fingerprints
from mmtune.recipe.text import load_recipe
from mmtune.training.optimizer import make_optimizer

LORA = {"targets": None, "r": 4, "alpha": 8}
TYPED = (7, 11, 5, 23, 9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return str(folder)


def made(base, method, **start):
    torch.manual_seed(0)
    own = {"towers": ["llm"], "lora": LORA, "virtual_tokens": 3, "base_path": base}
    return with_method(load_model(base), method, **own, soft_prompt=start)


def batch_of(count=4):
    batch = Rows().batch(range(count))
    batch.pop("labels")
    return batch


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch_of(), use_cache=False).logits


def typed(model):
    """The logits of the rows behind the typed text, its own left out."""
    batch = batch_of()
    ids = torch.tensor(TYPED).expand(len(batch["input_ids"]), -1)
    batch["input_ids"] = torch.cat((ids, batch["input_ids"]), 1)
    batch["attention_mask"] = torch.cat((torch.ones_like(ids), batch["attention_mask"]), 1)
    with torch.no_grad():
        return model.eval()(**batch, use_cache=False).logits[:, len(TYPED) :]


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_a_prompt_started_from_a_text_is_that_text_typed(base, method):
    model = made(base, method, init="text", text_ids=TYPED)
    assert virtual_tokens(model) == len(TYPED)
    wanted, mask = typed(load_model(base)), batch_of()["attention_mask"].bool()
    assert torch.allclose(logits(model)[mask], wanted[mask], atol=1e-5)
    assert not torch.allclose(wanted[mask], logits(load_model(base))[mask], atol=1e-2)


def test_a_prompt_started_from_the_vocabulary_holds_embeddings(base):
    model = made(base, "prompt", init="vocabulary", text_ids=[])
    own = model.prompt_encoder["default"].embedding.weight
    table = load_model(base).get_input_embeddings().weight
    assert own.shape[0] == 3 and all(any(torch.equal(one, other) for other in table) for one in own)


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_a_prompt_started_from_labels_holds_the_means_of_their_tokens(base, method):
    table = load_model(base).get_input_embeddings().weight
    own = made(base, method, init="labels", label_ids=[[7], [11, 5]]).prompt_encoder["default"].embedding.weight
    assert torch.allclose(own[0], table[7]) and torch.allclose(own[1], (table[11] + table[5]) / 2)
    assert len(own) == 3 and any(torch.equal(own[2], other) for other in table)
    own = made(base, method, init="labels", label_ids=[[7], [9], [5], [4]]).prompt_encoder["default"].embedding.weight
    assert torch.equal(own, table[[7, 9, 5]])


def test_p_tuning_by_an_lstm_trains_and_comes_back_as_what_it_made(base, tmp_path):
    model = made(base, "p_tuning", init="random", encoder="lstm")
    lstm = [name for name, parameter in model.named_parameters() if "lstm_head" in name and parameter.requires_grad]
    assert lstm and not any("lstm" in name for name, _ in made(base, "p_tuning", init="random").named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = run(model, Rows(), steps=12, rate=0.02, batch_rows=12)
    assert result.losses[-1] < result.losses[0]
    assert all(not torch.equal(model.get_parameter(name), start[name]) for name in lstm)
    end = logits(model)
    save_tuned(model, tmp_path / "adapter")
    assert torch.allclose(logits(load_tuned(base, tmp_path / "adapter")), end, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning", "lora"])
def test_the_base_is_the_same_to_the_byte_after_training(base, method, tmp_path):
    start = {"init": "text", "text_ids": TYPED} if method != "p_tuning" else {"init": "random", "text_ids": []}
    model = made(base, method, **start)
    before = fingerprints(load_model(base))
    run(model, Rows(), steps=6, rate=0.05)
    inner = model.get_base_model()
    after = {name.replace("base_layer.", ""): value for name, value in fingerprints(inner).items()}
    assert before == {name: value for name, value in after.items() if "lora_" not in name}
    save_tuned(model, tmp_path / "adapter")
    kept = {file.name for file in (tmp_path / "adapter").rglob("*.safetensors")}
    assert kept == {"adapter_model.safetensors"}


def test_lora_and_a_prompt_train_together_and_come_back(base, tmp_path):
    model = made(base, "lora", init="text", text_ids=TYPED)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in names) and any("prompt_encoder" in name for name in names)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in names}
    result = run(model, Rows(), steps=12, rate=0.02, batch_rows=12)
    assert result.losses[-1] < result.losses[0]
    moved = {name for name, p in model.named_parameters() if name in names and not torch.equal(p, start[name])}
    assert moved == names
    end = logits(model)
    save_tuned(model, tmp_path / "adapter")
    back = load_tuned(base, tmp_path / "adapter")
    assert torch.allclose(logits(back), end, atol=1e-4)
    assert lora_beside(back) is not None and virtual_tokens(back) == len(TYPED)
    # Each part is an adapter that PEFT loads alone.
    lora = PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter"))
    prompt = PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter" / "soft_prompt"))
    assert not lora.active_peft_config.is_prompt_learning and prompt.active_peft_config.is_prompt_learning
    assert not torch.allclose(logits(lora), end, atol=1e-3)


def test_virtual_tokens_have_a_rate_of_their_own(base):
    model = made(base, "lora", init="vocabulary", text_ids=[])
    optimizer = make_optimizer(model, rate=1e-3, weight_decay=0.0, beta2=0.999, prompt_rate=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.1 if "prompt_encoder" in names[id(parameter)] else 1e-3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{method: prompt, soft_prompt: {init: text}}", "give it as text"),
        ("{method: prompt, soft_prompt: {text: hello}}", "set init: text"),
        ("{method: full, soft_prompt: {init: vocabulary}}", "has no virtual tokens"),
        ("{method: prefix, soft_prompt: {init: vocabulary}}", "random or text, not vocabulary"),
        ("{method: prefix, soft_prompt: {init: labels}}", "random or text, not labels"),
        ("{method: p_tuning, soft_prompt: {init: text, text: a}}", "random, not text"),
        ("{method: p_tuning, soft_prompt: {init: labels}}", "random, not labels"),
        ("{method: prompt, soft_prompt: {encoder: lstm}}", "encoder is for method p_tuning, not prompt"),
        ("{method: p_tuning, soft_prompt: {encoder: gru}}", "mlp"),
        ("{method: prompt, soft_prompt: {learning_rate: 0.1}}", "beside lora"),
        ("{lora: {init: pissa}, soft_prompt: {init: vocabulary}}", "does not go with lora.init pissa"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, settings, expected):
    path = tmp_path / "r.yaml"
    path.write_text(f"run_dir: x\nfinetune: {settings}\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path, (), {})

"""Every tuning method learns, leaves the rest alone, and comes back from its folder as it was."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from course import Rows, run, tiny_model

from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.adapter import add_lora, add_noise_to_embeddings, save_tuned, train_fully
from mmtune.models.load import load_model, load_tuned
from mmtune.models.method import with_method
from mmtune.models.towers import fingerprints, tower_of, tower_table
from mmtune.recipe.text import load_recipe
from mmtune.training.loop import answer_loss
from mmtune.training.optimizer import make_optimizer, set_rate

LORA = {"targets": None, "r": 4, "alpha": 8}
KINDS = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"rslora": True}),
    "dora": ("lora", {"dora": True}),
    "pissa": ("lora", {"pissa": True}),
    "ia3": ("ia3", {}),
    "prompt": ("prompt", {}),
    "p_tuning": ("p_tuning", {}),
    "prefix": ("prefix", {}),
    "full": ("full", {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return str(folder)


def tuned(base, kind, towers=("llm",), soft_prompt=None):
    method, more = KINDS[kind]
    own = {"towers": towers, "lora": {**LORA, **more}, "virtual_tokens": 3, "base_path": base}
    torch.manual_seed(0)
    return with_method(load_model(base), method, **own, soft_prompt=soft_prompt)


def logits(model):
    batch = Rows().batch(range(4))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch, use_cache=False).logits


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_learns_and_comes_back(base, kind, tmp_path):
    model = tuned(base, kind)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = fingerprints(model)
    start = logits(model)
    plain = logits(load_model(base))
    if kind in ("lora", "rslora", "dora", "pissa", "ia3", "full"):
        assert torch.allclose(start, plain, atol=1e-5), "it must start as the base"
    result = run(model, Rows(), steps=12, rate=0.02, batch_rows=12)
    assert result.losses[-1] < result.losses[0]
    after = fingerprints(model)
    assert all(after[name] == before[name] for name in frozen)
    assert {row.tower for row in tower_table(model) if row.trainable} == {"llm"}
    end = logits(model)
    assert end.shape == plain.shape and not torch.allclose(end, start, atol=1e-3)
    save_tuned(model, tmp_path / "adapter")
    back = logits(load_tuned(base, tmp_path / "adapter"))
    assert torch.allclose(back, end, atol=1e-4), float((back - end).abs().max())


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix", "ia3", "lora beside a prompt"])
def test_generation_after_loading_is_greedy_over_plain_calls(base, kind, tmp_path):
    kind, _, beside = kind.partition(" ")
    model = tuned(base, kind, soft_prompt={"init": "text", "text_ids": (7, 11, 5)} if beside else None)
    run(model, Rows(), steps=2, rate=0.02)
    save_tuned(model, tmp_path / "adapter")
    back = load_tuned(base, tmp_path / "adapter")
    batch = {name: value for name, value in Rows().batch([2]).items() if name != "labels"}
    made = back.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, -4:]
    ids = batch["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            step = back(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=batch["pixel_values"],
                use_cache=False,
            ).logits
        ids = torch.cat([ids, step[:, -1:].argmax(-1)], 1)
    assert made.tolist() == ids[:, -4:].tolist()


def test_soft_prompts_refuse_families_that_they_would_shift():
    path = Path(__file__).parents[1] / "training" / "conftest.py"
    spec = importlib.util.spec_from_file_location("families", path)
    families = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    for name in ("qwen2_5_vl", "gemma3"):
        with pytest.raises(CapabilityError, match="does not fit"):
            with_method(families.tiny(name).model, "prompt", towers=["llm"], lora=LORA, virtual_tokens=3, base_path="")


def test_pissa_is_saved_as_an_adapter_for_the_untouched_base(base, tmp_path):
    import json

    model = tuned(base, "pissa")
    weight = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.equal(weight, load_model(base).model.language_model.layers[0].self_attn.q_proj.weight)
    run(model, Rows(), steps=2)
    save_tuned(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 2 * LORA["r"] and config["init_lora_weights"] is True


def test_rslora_scales_by_the_root_of_the_rank():
    model = add_lora(tiny_model(), towers=["llm"], targets=["q_proj"], r=4, alpha=8, rslora=True)
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj") and "language_model" in n)
    assert layer.scaling["default"] == 8 / 4**0.5


def test_a_rank_above_every_layers_own_is_an_error() -> None:
    model = tiny_model()
    layer = model.get_decoder().layers[0].self_attn.q_proj
    with pytest.raises(RecipeError, match=f"no layer that it adapts has a rank above {layer.in_features}"):
        add_lora(model, towers=["llm"], targets=["q_proj"], r=layer.in_features + 1, alpha=8)
    add_lora(model, towers=["llm"], targets=["q_proj"], r=layer.in_features, alpha=8)


def test_lora_plus_gives_the_rates_of_peft():
    model = add_lora(tiny_model(), towers=["llm"], targets=None, r=2, alpha=4)
    ours = make_optimizer(model, rate=0.01, weight_decay=0.0, beta2=0.999, plus_ratio=16.0)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    rates = [{id(p): group["lr"] for group in o.param_groups for p in group["params"]} for o in (ours, theirs)]
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0].values())) == 2


def test_towers_have_their_own_rates_through_the_schedule():
    model = train_fully(tiny_model(), ["llm", "vision", "projector"])
    optimizer = make_optimizer(model, rate=0.01, weight_decay=0.1, beta2=0.999, tower_rates={"vision": 0.001})
    set_rate(optimizer, 0.005)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            vision = tower_of(names[id(parameter)]) == "vision"
            assert group["lr"] == pytest.approx(0.0005 if vision else 0.005)
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_neftune_adds_noise_while_training_only():
    model = tiny_model()
    embeddings = model.get_input_embeddings()
    ids = Rows().batch(range(2))["input_ids"]
    plain = embeddings(ids).detach()
    add_noise_to_embeddings(model, 5.0, row_tokens=7.5)
    assert torch.equal(embeddings.eval()(ids), plain)
    noise = (embeddings.train()(ids) - plain).abs()
    # Of the mean row, whatever stands in this batch.
    bound = 5.0 / (7.5 * plain.shape[-1]) ** 0.5
    assert 0.9 * bound < noise.max() <= bound * 1.0001
    media = torch.full((1, 2), model.config.image_token_id)
    assert torch.equal(embeddings(media), embeddings.eval()(media))
    first, again = (run_with_noise() for _ in range(2))
    assert first == again


def run_with_noise():
    model = tiny_model()
    add_noise_to_embeddings(model, 5.0, row_tokens=7.5)
    return run(add_lora(model, towers=["llm"], targets=None, r=2, alpha=4), Rows(), steps=2).losses


def test_qlora_holds_the_language_model_alone_in_four_bits(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'mmtune[qlora]')")
    from bitsandbytes.nn import Linear4bit

    model = load_model(base, nf4=True)
    small = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert small == {name for name in linear if "language_model" in name}
    assert all(m.quant_state.quant_type == "nf4" and m.quant_state.nested for m in map(model.get_submodule, small))
    wrapped = add_lora(model, towers=["llm"], targets=None, r=4, alpha=8, base_path=base)
    result = run(wrapped, Rows(), steps=10, rate=0.02, batch_rows=12)
    assert result.losses[-1] < result.losses[0] and result.outcome.unseen == set()
    save_tuned(wrapped, tmp_path)
    nll, count = answer_loss(load_tuned(base, tmp_path), Rows().batch(range(12)))
    assert nll.item() / count < result.losses[0]


def test_a_validation_pass_leaves_four_bit_weights_as_they_are(base):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'mmtune[qlora]')")
    wrapped = add_lora(load_model(base, nf4=True), towers=["llm"], targets=None, r=4, alpha=8, base_path=base)

    def step() -> list[torch.Tensor]:
        wrapped.train().zero_grad(set_to_none=True)
        answer_loss(wrapped, Rows().batch(range(4)))[0].backward()
        return [parameter.grad.clone() for parameter in wrapped.parameters() if parameter.grad is not None]

    before = step()
    with torch.no_grad():
        answer_loss(wrapped.eval(), Rows().batch(range(4)))
    after = step()
    assert before and all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{method: ia3, train: [llm, vision]}", r"works on the language model alone: set train to \[llm\]"),
        ("{method: full, quantize: nf4}", "cannot train themselves"),
        ("{lora: {init: pissa, dora: true}}", "does not go with dora"),
        ("{method: prefix, checkpointing: true}", "key-value cache"),
        ("{tower_rates: {vision: 1e-5}}", "which does not train"),
        ("{lora: {plus_ratio: 0.5}}", "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, settings, expected):
    path = tmp_path / "r.yaml"
    path.write_text(f"run_dir: x\nfinetune: {settings}\n")
    with pytest.raises(RecipeError, match=expected):
        load_recipe(path, (), {})

"""A named revision of a hub model is the one that is read: config, weights, processor and encoder."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from mmtune.encoding.processor import chat_template_of, load_processor
from mmtune.errors import CapabilityError, IntegrityError
from mmtune.models.digest import weights_digest
from mmtune.models.load import load_model
from mmtune.models.tuned_from import base_of
from mmtune.models.unimodal import load_unimodal


@pytest.fixture
def hub(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Id of a model in a cache of the hub: ``main``, and ``second`` with other weights and another chat template."""
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", "a" * 40), ("second", "b" * 40)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(tiny_vlm, repository / "snapshots" / commit)
    second = repository / "snapshots" / ("b" * 40)
    template = second / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text("utf-8"), "utf-8")
    model = LlavaForConditionalGeneration.from_pretrained(tiny_vlm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(second)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return "org/tiny"


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_model_and_processor(hub: str) -> None:
    main, second = (load_model(hub, revision=revision, offline=True) for revision in (None, "second"))
    assert torch.equal(2 * weights(main), weights(second))
    digests = [weights_digest(hub, revision=revision, offline=True) for revision in (None, "second")]
    assert digests == ["a" * 40, "b" * 40]
    templates = [chat_template_of(load_processor(hub, revision=name, offline=True)) for name in ("main", "second")]
    assert templates[1] == "{# another #}" + templates[0]


def test_an_encoder(hub: str) -> None:
    main, second = (load_unimodal(hub, "text", revision=name, offline=True).model for name in ("main", "second"))
    assert torch.equal(2 * weights(main), weights(second))


def test_an_adapter_of_another_commit_is_told_which_to_name(hub: str) -> None:
    made = {"model": hub, "revision": None, "weights": "b" * 40}
    assert base_of(made, (hub, "second"), offline=True).weights == "b" * 40
    with pytest.raises(IntegrityError, match="another one") as error:
        base_of(made, (hub, None), offline=True)
    assert error.value.hint.startswith(f"name the commit: `model: {{revision: {'b' * 40}}}`")


def test_one_that_is_not_there(hub: str) -> None:
    with pytest.raises(CapabilityError, match="org/tiny"):
        load_model(hub, revision="third", offline=True)

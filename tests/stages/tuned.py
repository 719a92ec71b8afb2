"""What a finetune run left behind."""

import json

import pytest

from mmtune.errors import Interrupted
from mmtune.stages.finetune import finetune
from mmtune.talk import Talk
from mmtune.training import loop


def metrics_of(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "adapter" / "metrics.jsonl").read_text().splitlines()]


def weights_of(recipe):
    return (recipe.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def numbers_of(recipe):
    return [[row[name] for name in ("step", "loss", "grad_norm")] for row in metrics_of(recipe)]


def left_by(recipe):
    """The bytes of all weights, and the losses."""
    folder = recipe.run_dir / "adapter"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}, numbers_of(recipe)


def stopped_and_resumed(recipe, monkeypatch):
    """Trains again, stopped after the third step and gone on with; returns what that said."""
    asked, polls = loop.Loop.stop_wanted, iter([False, False, True])
    monkeypatch.setattr(loop.Loop, "stop_wanted", lambda _: next(polls))
    with pytest.raises(Interrupted):
        finetune(recipe, force=True, console=Talk(quiet=True))
    monkeypatch.setattr(loop.Loop, "stop_wanted", asked)
    console = Talk(quiet=True)
    finetune(recipe, force=True, console=console)
    return console.lines

"""What a finetune run left behind."""

import json


def metrics_of(recipe):
    return [json.loads(line) for line in (recipe.run_dir / "adapter" / "metrics.jsonl").read_text().splitlines()]


def weights_of(recipe):
    return (recipe.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def numbers_of(recipe):
    return [[row[name] for name in ("step", "loss", "grad_norm")] for row in metrics_of(recipe)]

"""Advice on keys that a recipe does not have: typing errors, wrong places, and what other trainers call them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Key of TRL, transformers, LLaMA-Factory, ms-swift or Axolotl -> key of a recipe.
ELSEWHERE: dict[str, str] = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output_dir": "run_dir",
    "dataset": "sources",
    "datasets": "sources",
    "dataset_dir": "sources[].path",
    "media_dir": "sources[].images",
    "image_folder": "sources[].images",
    "max_samples": "sources[].limit",
    "val_size": "sources[].part",
    "split_dataset_ratio": "sources[].part",
    "val_set_size": "sources[].part",
    "default_system": "build.system",
    "cutoff_len": "tokenize.max_length",
    "max_seq_length": "tokenize.max_length",
    "sequence_len": "tokenize.max_length",
    "image_max_pixels": "tokenize.max_image_pixels",
    "max_pixels": "tokenize.max_image_pixels",
    "image_min_pixels": "tokenize.min_image_pixels",
    "min_pixels": "tokenize.min_image_pixels",
    "video_maxlen": "tokenize.video_frames",
    "finetuning_type": "finetune.method",
    "train_type": "finetune.method",
    "tuner_type": "finetune.method",
    "adapter": "finetune.method",
    "lora_rank": "finetune.lora.r",
    "rank": "finetune.lora.r",
    "lora_r": "finetune.lora.r",
    "lora_alpha": "finetune.lora.alpha",
    "lora_dropout": "finetune.lora.dropout",
    "lora_target": "finetune.lora.targets",
    "target_modules": "finetune.lora.targets",
    "lora_target_modules": "finetune.lora.targets",
    "use_rslora": "finetune.lora.rslora",
    "use_dora": "finetune.lora.dora",
    "loraplus_lr_ratio": "finetune.lora.plus_ratio",
    "freeze_vision_tower": "finetune.train",
    "freeze_multi_modal_projector": "finetune.train",
    "freeze_language_model": "finetune.train",
    "freeze_vit": "finetune.train",
    "freeze_aligner": "finetune.train",
    "freeze_llm": "finetune.train",
    "quantization_bit": "finetune.quantize",
    "quant_bits": "finetune.quantize",
    "load_in_4bit": "finetune.quantize",
    "num_train_epochs": "finetune.epochs",
    "num_epochs": "finetune.epochs",
    "per_device_train_batch_size": "finetune.batch_rows",
    "micro_batch_size": "finetune.batch_rows",
    "gradient_accumulation_steps": "finetune.accumulate",
    "lr": "finetune.learning_rate",
    "vit_lr": "finetune.tower_rates",
    "aligner_lr": "finetune.tower_rates",
    "lr_scheduler_type": "finetune.schedule",
    "lr_scheduler": "finetune.schedule",
    "warmup_ratio": "finetune.warmup",
    "warmup_steps": "finetune.warmup",
    "adam_beta2": "finetune.beta2",
    "optim": "finetune.optimizer",
    "max_grad_norm": "finetune.clip",
    "neftune_noise_alpha": "finetune.neftune_alpha",
    "bf16": "finetune.precision",
    "fp16": "finetune.precision",
    "torch_dtype": "finetune.precision",
    "gradient_checkpointing": "finetune.checkpointing",
    "flash_attn": "model.attn",
    "flash_attention": "model.attn",
    "attn_impl": "model.attn",
    "attn_implementation": "model.attn",
    "deepspeed": "finetune.shard",
    "fsdp": "finetune.shard",
    "dataloader_num_workers": "finetune.workers",
    "save_steps": "finetune.save_every",
    "save_total_limit": "finetune.keep",
    "eval_steps": "finetune.eval_every",
    "logging_steps": "finetune.log_every",
    "report_to": "finetune.trackers",
    "merge_lora": "export",
}

# Keys of theirs that need none here -> why.
NEEDLESS: dict[str, str] = {
    "template": "the chat template is the model's own; `sources[].template` is a wording of questions",
    "chat_template": "the chat template is the model's own",
    "packing": "rows are packed wherever it is exact",
    "neat_packing": "rows are packed wherever it is exact",
    "sample_packing": "rows are packed wherever it is exact",
    "stage": "the recipe's sections say what is done",
    "do_train": "the recipe's sections say what is done",
    "export_dir": "mmtune export writes exported/ below `run_dir`; `export.dtype` says how",
    "export_size": "mmtune export cuts files as transformers does; `export.dtype` says in what weights are kept",
}


def advice(name: str, known: Sequence[str], everywhere: Sequence[str]) -> str:
    """Returns what to write in place of an unknown key.

    Args:
        name: The key's last part, as it was given.
        known: Keys of the section that it stands in.
        everywhere: All keys of a recipe by their whole path, those of lists with ``[]``.
    """
    if name in NEEDLESS:
        return NEEDLESS[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    if not close and name in ELSEWHERE:
        ours = ELSEWHERE[name]
        own = ours.rpartition(".")[2]
        return f"that is `{own if own in known else ours}` here"
    placed = [path for path in everywhere if path.rpartition(".")[2] == name]
    if not close and placed:
        highest = min(path.count(".") for path in placed)
        return f"there is {' and '.join(f'`{path}`' for path in placed if path.count('.') == highest)}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"

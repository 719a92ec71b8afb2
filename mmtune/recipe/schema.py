"""The whole recipe, and the model that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmtune.recipe.build import Build
from mmtune.recipe.evaluation import BY_STATES, Eval
from mmtune.recipe.export import Export
from mmtune.recipe.extract import Extract
from mmtune.recipe.finetune import Finetune
from mmtune.recipe.pretrain import TOWER_OF, Pretrain
from mmtune.recipe.prompt import Prompt
from mmtune.recipe.section import Section
from mmtune.recipe.sources import Source
from mmtune.recipe.tokenize import Tokenize


class Model(Section):
    """The model that is tuned."""

    path: str
    """Hub id, or a folder with config.json, safetensors, tokenizer and processor. What is no folder beside the recipe
    and reads name or org/name is a hub id, but for data/NAME; ./NAME is always a folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    attn: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel. auto: FlexAttention for packed trees on a GPU if it proves exact, else transformers' choice;
    flex_attention: no other for trees. A flash kernel takes no mask of trees, so rows train apart. A tower that has no
    such kernel keeps its own."""


class Recipe(Section):
    """One run: sources, and one section per stage."""

    description: str = ""
    """What the recipe is for."""
    run_dir: Path
    """Folder that the stage folders stand in."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The only source of randomness."""
    model: Model | None = None
    """The base model; left out with pretrain, which makes it in base/."""
    sources: tuple[Source, ...] = ()
    """Raw datasets."""
    build: Build = Build()
    """Settings of build-data."""
    extract: Extract | None = None
    """Settings of extract; absent: `run` does not extract."""
    prompt: Prompt | None = None
    """Settings of the prompt search; absent: `run` does not search."""
    tokenize: Tokenize = Tokenize()
    """Settings of tokenize."""
    pretrain: Pretrain | None = None
    """Settings of pretrain; absent: `run` does not make a base model of its own."""
    finetune: Finetune | None = None
    """Settings of finetune; absent: `run` does not train."""
    eval: Eval | None = None
    """Settings of eval; absent: `run` does not evaluate."""
    export: Export | None = None
    """Settings of export; absent: `run` does not export."""

    @model_validator(mode="before")
    @classmethod
    def _model_of_pretrain(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not values.get("pretrain") or not values.get("run_dir"):
            return values
        made = str(Path(values["run_dir"]) / "base")
        model = values.get("model") or {}
        if isinstance(model, dict):
            model = {"path": made, **model}
        path = model["path"] if isinstance(model, dict) else getattr(model, "path", None)
        if path is not None and str(path) != made:
            raise ValueError(f"pretrain makes the model {made}: leave out model.path, or pretrain")
        return {**values, "model": model}

    @property
    def named_model(self) -> tuple[str, str | None] | None:
        """Path and revision of the model that the recipe names."""
        return (self.model.path, self.model.revision) if self.model else None

    @property
    def processor_path(self) -> str:
        """Where the processor is: with the model, or with its untrained parts, which are there before it."""
        if self.pretrain is not None:
            return str(self.run_dir / "start")
        return self.model.path if self.model else ""

    @model_validator(mode="after")
    def _towers_that_are_built(self) -> Recipe:
        """What tunes a model that pretrain makes is known before it is made."""
        if self.pretrain is None or self.finetune is None:
            return self
        build = self.pretrain.build
        has = {"llm", "projector", *(tower for part, tower in TOWER_OF.items() if part in build.encoders)}
        if build.fusion.mode != "early" or build.fusion.attention != "none":
            has.add("fusion")
        for tower in self.finetune.train:
            if tower not in has:
                names = ", ".join(sorted(has))
                raise ValueError(f"finetune.train names the tower {tower}, which pretrain.build does not make: {names}")
        return self

    @model_validator(mode="after")
    def _exports_what_weights_can_say(self) -> Recipe:
        tuned = self.finetune
        if self.export and tuned and (tuned.method in ("prompt", "p_tuning", "prefix") or tuned.soft_prompt):
            raise ValueError("export writes weights, and finetune trains virtual tokens: leave export or those out")
        return self

    @model_validator(mode="after")
    def _prompts_are_tested_on_rows_apart(self) -> Recipe:
        split = (self.eval or Eval()).split if self.prompt and self.prompt.test_split is None else None
        if split == "train":
            raise ValueError("eval.split is train, where the dev rows of prompt come from: set prompt.test_split")
        if self.prompt and self.eval and self.eval.answer in BY_STATES:
            raise ValueError("a prompt search is scored by eval.answer generate or rank: set one, or leave prompt out")
        return self

    @model_validator(mode="after")
    def _wordings_of_templates(self) -> Recipe:
        if self.build.prompt and self.eval and self.eval.ensemble and self.eval.ensemble.wordings:
            raise ValueError("build.prompt words every row, and eval.ensemble.wordings asks in others: leave one out")
        return self

    @model_validator(mode="after")
    def _unique_sources(self) -> Recipe:
        seen: set[tuple[str, str]] = set()
        for source in self.sources:
            if (source.id, source.split) in seen:
                raise ValueError(f"two sources have the id {source.id!r} in split {source.split!r}")
            seen.add((source.id, source.split))
        return self

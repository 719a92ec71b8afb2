"""finetune: the settings of training, of its adapters and of what it keeps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmtune.recipe.section import Section, Tower, Weight


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale; the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """all-linear, or module names such as [q_proj, v_proj], within the trained towers."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353)."""
    init: Literal["default", "pissa"] = "default"
    """default starts with no change; pissa with the principal components of the weights (arXiv:2404.02948), saved as
    an ordinary adapter of twice the rank."""
    plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+ (arXiv:2402.12354): learning rate of B over that of A; the paper takes 16."""


class SoftPrompt(Section):
    """finetune.soft_prompt: what virtual tokens start from; beside method lora, virtual tokens that train with it."""

    init: Literal["random", "vocabulary", "labels", "text"] = "random"
    """random; vocabulary: embeddings of random tokens (method prompt, or beside lora); labels: of the training rows'
    options, or where they have none of their answers, the most frequent first, a label of several tokens as their mean,
    and of random tokens beyond them (as vocabulary; arXiv:2104.08691); text: as if the text stood typed before every
    row, with as many virtual tokens as it has tokens (not p_tuning)."""
    text: str = ""
    """The text of init text."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes the virtual tokens of p_tuning out of learned ones: an MLP, or the paper's LSTM both ways
    (arXiv:2103.10385). Only what it makes is saved."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate of the virtual tokens beside method lora, which want a higher one than adapters; else
    finetune.learning_rate."""

    @model_validator(mode="after")
    def _has_its_text(self) -> SoftPrompt:
        if self.init == "text" and not self.text.strip():
            raise ValueError("init text starts from a text: give it as text")
        if self.init != "text" and self.text:
            raise ValueError("text is what init text starts from: set init: text, or leave text out")
        return self


class Augment(Section):
    """finetune.augment: what may happen to an image while training; validation and eval see it as it is."""

    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Longest move along each side, as a share of it; the edge's pixels fill what comes free."""
    flips: tuple[Literal["horizontal", "vertical"], ...] = ()
    """Mirror half of the images; not where questions ask for left, right, above or written text."""

    @model_validator(mode="after")
    def _changes_something(self) -> Augment:
        if not self.shift and not self.flips:
            raise ValueError("augment changes nothing: give shift or flips, or leave it out")
        return self


class Features(Section):
    """finetune.features: outputs of frozen towers, and of a projector that does not train, kept in features/towers/."""

    use: Literal["auto", "on", "off"] = "auto"
    """auto keeps them when media are seen again, nothing changes them while training, and there is room."""
    most_gib: Annotated[float, Field(gt=0)] = 20.0
    """auto keeps no more than this of images, and no more of sounds."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is the precision of the training: exact in fp32, and bf16 under bf16; bf16 halves the size of fp32."""


class Finetune(Section):
    """finetune: tokens/ to adapter/."""

    method: Literal["lora", "full", "ia3", "prompt", "p_tuning", "prefix"] = "lora"
    """lora trains adapters; full trains the weights of the chosen towers. On the language model alone: ia3 trains
    factors on keys, values and MLP; prompt and p_tuning virtual tokens; prefix virtual keys and values."""
    virtual_tokens: Annotated[int, Field(ge=1, le=1024)] = 20
    """Virtual tokens of prompt, p_tuning and prefix, and of soft_prompt beside lora."""
    soft_prompt: SoftPrompt | None = None
    """What virtual tokens start from. With method lora, virtual tokens before every row train beside the adapters."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: QLoRA; the frozen language model rests in 4 bits, its head and the towers do not (needs mmtune[qlora])."""
    lora: Lora = Lora()
    """Settings of the adapters."""
    train: tuple[Tower, ...] = ("llm",)
    """Towers that train: llm, projector, vision, audio, behaviour, and of a composite model fusion (its gate, segments,
    attention to media), which lora trains whole and saves in adapter/ too."""
    unfreeze: dict[Tower, Annotated[float, Field(gt=0)]] = {}
    """With method full: epochs for which a tower that trains stays frozen first, such as {vision: 3, llm: 5} (MMBT)."""
    augment: Augment | None = None
    """Change training images a little at every step; for few images and a tower that trains."""
    features: Features = Features()
    """Run a frozen tower once per image or sound, not at every step; not at all once its features are proved."""
    pixels_gib: Annotated[float, Field(gt=0)] | None = None
    """Keep processed images in features/pixels/, up to so many GiB: no large photo is decoded twice, for any run of
    this run_dir. Exact; unused where features stand for pixels or augment changes them."""
    from_scratch: bool = False
    """Ignore the pretrained weights and start from random ones (a baseline, not a way to work)."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data; ignored when max_steps is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0e-4
    """Peak learning rate."""
    tower_rates: dict[Tower, Annotated[float, Field(gt=0, le=10)]] = {}
    """Peak learning rates of single towers, such as {vision: 1e-5}; the others take learning_rate."""
    task_weights: dict[str, Weight] = {}
    """Weights of the label tokens of tasks, by the task's name; 1 for others. The loss is then the weighted sum of the
    tasks' losses, and each stands by its name in metrics.jsonl; without any of them all tokens count the same."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Uniform noise on the token embeddings while training (NEFTune, arXiv:2310.05914); the paper takes 5."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of the steps, else a number of steps."""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw_8bit: a quarter of AdamW's memory (needs mmtune[qlora]). muon: Muon for the matrices of hidden layers at
    AdamW's learning rate, AdamW for the rest; it learns in fewer steps where whole towers train."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay on matrices."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """AdamW second moment decay."""
    batch_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows per micro batch and process; batch_tokens alone decides when not given."""
    batch_tokens: Annotated[int, Field(ge=1)] = 8192
    """Most padded tokens per micro batch and process."""
    batch_media_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most media tokens per micro batch and process, where a tower needs more memory than the language model."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro batches per optimizer step."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    shard: Literal["none", "zero2", "zero3"] = "none"
    """With several processes: zero3 spreads weights, gradients and optimizer state of the language model over them;
    zero2 keeps the weights gathered between forward and backward pass, or whole (deepspeed); faster and larger."""
    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """Who spreads them: PyTorch's FSDP2, or DeepSpeed (needs mmtune[deepspeed] and llm in train)."""
    offload: bool = False
    """The language model's weights, gradients and optimizer state rest in the CPU's memory, where the optimizer
    steps: its parts with shard, the whole with one process."""
    liger: Literal["auto", "off"] = "auto"
    """auto takes Liger's kernels on a GPU, where they are installed (mmtune[fast]) and know the family."""
    save_every: Annotated[int, Field(ge=1)] = 200
    """Checkpoint every so many optimizer steps."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Validation loss every so many optimizer steps; always at the end when there is a val split."""
    eval_rows: Annotated[int, Field(ge=1)] = 512
    """At most so many rows for the validation loss."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """A line of metrics every so many optimizer steps."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Also send metrics there, through Accelerate."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that load media ahead of the step; 0 loads in a thread of the training process."""
    rank_timeout_seconds: Annotated[int, Field(ge=1)] = 600
    """With several processes: a process that waits this long for the others ends the run."""

    @field_validator("train")
    @classmethod
    def _some_tower(cls, value: tuple[Tower, ...]) -> tuple[Tower, ...]:
        if not value:
            raise ValueError("name at least one tower; freezing everything would train nothing")
        if len(set(value)) != len(value):
            raise ValueError("a tower is named twice")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Finetune:
        if self.method not in ("lora", "full") and self.train != ("llm",):
            raise ValueError(f"method {self.method} works on the language model alone: set train to [llm]")
        if self.from_scratch and self.method != "full":
            raise ValueError("from_scratch goes with method full: an adapter fits only the weights it was trained on")
        if self.method == "lora" and self.train == ("fusion",):
            raise ValueError("train [fusion] alone has nothing for lora to adapt: add llm, or take method full")
        if self.lora.init == "pissa" and "fusion" in self.train:
            raise ValueError("lora.init pissa does not go with fusion in train")
        if self.optimizer == "muon" and self.method not in ("lora", "full"):
            raise ValueError(f"optimizer muon is for matrices; method {self.method} has none: leave it out")
        if self.quantize != "none" and self.method != "lora":
            raise ValueError("quantize is for method lora: 4-bit weights cannot train themselves")
        self._shards()
        if self.unfreeze:
            self._stages()
        if self.lora.init == "pissa" and (self.lora.dora or self.lora.rslora or self.quantize != "none"):
            raise ValueError("lora.init pissa does not go with dora, rslora or quantize")
        if self.features.use == "on":
            self._keeps_features()
        if self.soft_prompt is not None:
            self._starts(self.soft_prompt)
        if self.method == "prefix" and self.checkpointing:
            raise ValueError("checkpointing does not go with method prefix, which fills the key-value cache")
        idle = sorted(set(self.tower_rates) - set(self.train))
        if idle:
            raise ValueError(f"tower_rates names {', '.join(idle)}, which does not train")
        return self

    def _keeps_features(self) -> None:
        """Says what changes the features of a tower from one step to the next."""
        if self.augment:
            raise ValueError("features.use on keeps what towers make of images, which augment changes: leave one out")
        trained = next((tower for tower in self.train if tower in ("vision", "audio")), None)
        if trained:
            raise ValueError(f"features.use on keeps what frozen towers make; train names {trained}: set it to auto")

    def _starts(self, prompt: SoftPrompt) -> None:
        """Says what a soft prompt does not go with."""
        if self.method not in ("lora", "prompt", "p_tuning", "prefix"):
            raise ValueError(f"soft_prompt does not go with method {self.method}, which has no virtual tokens")
        known = {"p_tuning": ("random",), "prefix": ("random", "text")}.get(self.method)
        if known is not None and prompt.init not in known:
            names = " or ".join(known)
            raise ValueError(f"soft_prompt.init of method {self.method} is {names}, not {prompt.init}")
        if prompt.encoder != "mlp" and self.method != "p_tuning":
            raise ValueError(f"soft_prompt.encoder is for method p_tuning, not {self.method}")
        if prompt.learning_rate is not None and self.method != "lora":
            raise ValueError("soft_prompt.learning_rate is for virtual tokens beside lora: set finetune.learning_rate")
        if self.method == "lora" and (self.lora.init == "pissa" or self.shard != "none" or self.offload):
            raise ValueError("a soft_prompt beside lora does not go with lora.init pissa, shard or offload")

    def _stages(self) -> None:
        """Says what towers that start frozen do not go with."""
        if self.method != "full" or self.shard != "none" or self.offload:
            raise ValueError("unfreeze goes with method full, and not with shard and offload")
        still = sorted(set(self.unfreeze) - set(self.train))
        if still:
            raise ValueError(f"unfreeze names {still[0]}, which does not train: add it to train")
        if not set(self.train) - set(self.unfreeze):
            raise ValueError("unfreeze freezes every tower that trains at the beginning: leave one out")

    def _shards(self) -> None:
        """Says what does not go with spread weights."""
        if self.engine == "deepspeed" and (self.shard == "none" or "llm" not in self.train):
            raise ValueError("engine deepspeed goes with shard zero2 or zero3, and with llm in train")
        if self.engine == "deepspeed" and self.method not in ("lora", "full", "ia3"):
            raise ValueError(f"engine deepspeed does not go with method {self.method}: take fsdp2")
        if self.shard == "none" and not self.offload:
            return
        if self.quantize != "none" or self.optimizer != "adamw":
            raise ValueError("shard and offload do not go with quantize, nor with another optimizer than adamw")
        if self.lora.init == "pissa":
            raise ValueError("shard and offload do not go with lora.init pissa")

"""prompt: the settings of the search for a better prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmtune.recipe.section import Section, SplitName

Part = Literal["instruction", "exemplars", "verbalizer"]


class ProposerModel(Section):
    """prompt.llm: the chat model that proposes prompts, behind any OpenAI-compatible URL."""

    url: str
    """Base URL, such as http://localhost:8000/v1; /chat/completions is asked."""
    model: str
    """Its name at that server."""
    key_env: str | None = None
    """Environment variable with the key; the key itself never stands in a recipe."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for one answer."""
    retries: Annotated[int, Field(ge=0, le=10)] = 4
    """More tries after a timeout, a 429 or a 5xx, with growing pauses of at most 30 seconds."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Of its answers."""


class Writer(Section):
    """prompt.rl.writer: a causal language model that writes the prompts of policy lm, and learns by TRL's GRPO."""

    model: str
    """Folder or hub id."""
    request: str = ""
    """What it is asked for; default: one instruction for a task of which some solved rows are shown."""
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    """Longest prompt that it may write."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0e-5
    """Of its adapters."""
    lora_r: Annotated[int, Field(ge=1)] = 16
    """Rank of its adapters."""


class Rl(Section):
    """prompt.rl: policy gradient over the words of a prompt (after RLPrompt, arXiv:2205.12548)."""

    policy: Literal["words", "lm"] = "words"
    """words: a small policy over single words; lm: a language model that writes the prompt and learns by GRPO."""
    words: Literal["pieces"] | tuple[str, ...] = "pieces"
    """What a prompt is made of: pieces are all of the tokenizer's with a letter in them; or a list of words. Answers of
    the rows are left out. The words stand before `instruction`, or in its place where it names no slot."""
    length: Annotated[int, Field(ge=1, le=64)] = 4
    """Words of a prompt."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """A word is drawn from so many likeliest at its position; 0 is all. RLPrompt takes 256."""
    hidden: Annotated[int, Field(ge=0, le=4096)] = 32
    """Units of an MLP over the frozen embedding of the word before, so that like words learn from each other; 0 learns
    the logits of every position by themselves, which does for a short list of words."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.5
    """Adam's step size on the policy."""
    entropy: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the policy's entropy: more keeps it trying."""
    writer: Writer | None = None
    """The language model of policy lm."""

    @model_validator(mode="after")
    def _fits_together(self) -> Rl:
        if (self.policy == "lm") != (self.writer is not None):
            raise ValueError("policy lm and the section writer go together: give the writer's model, or leave both out")
        return self


class Bbt(Section):
    """prompt.bbt: CMA-ES over soft tokens in a random subspace (arXiv:2201.03514); nothing is differentiated."""

    soft_tokens: Annotated[int, Field(ge=1, le=1024)] = 50
    """Vectors before every row."""
    dimension: Annotated[int, Field(ge=2, le=10_000)] = 500
    """Width of the subspace."""
    sigma: Annotated[float, Field(gt=0)] = 1.0
    """First standard deviation of CMA-ES."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """How far the first soft prompts are from where they start, in standard deviations of the word embeddings."""


class Prompt(Section):
    """prompt: a search for a better prompt, with a frozen model, to prompt/."""

    method: Literal["ape", "opro", "mipro", "gepa", "rl", "bbt", "random"] = "ape"
    """ape: induce and resample (arXiv:2211.01910); opro: from the history of the best (arXiv:2309.03409); mipro: TPE
    over instruction, exemplars and verbalizer (arXiv:2406.11695); gepa: reflective Pareto search (arXiv:2507.19457);
    rl: policy gradient over single words (after arXiv:2205.12548); bbt: CMA-ES over soft tokens (arXiv:2201.03514);
    random: draws, the baseline of all."""
    budget: Annotated[int, Field(ge=1)] = 1000
    """Model calls of the search: scored pairs of prompt and row. Random search gets as many again, for comparison."""
    space: tuple[Part, ...] = ("instruction",)
    """What may change: the instruction, the solved rows before it, the words of the labels."""
    on: Literal["base", "tuned"] = "base"
    """The frozen model that the prompts are tried on."""
    instruction: str = "{prompt}"
    """Where the search starts. {prompt} is what the row's template says; {question}, {text}, {context}, {options} and
    the other slots of templates name parts of it."""
    sources: tuple[str, ...] = ()
    """Rows of these sources only; default: of all."""
    dev: Annotated[int, Field(ge=2)] = 64
    """Training rows that prompts are scored on; they never become exemplars."""
    test: Annotated[int, Field(ge=1)] = 200
    """Rows of the test split that nothing is chosen by: start, best and random search's best are scored on them."""
    test_split: SplitName | None = None
    """Split of the test rows, not train, where the dev rows come from; default: that of eval."""
    reward: Literal["metric", "gap", "piecewise", "likelihood"] = "metric"
    """metric: the row's first metric that has a value of one row alone, answered as eval does (of captions ROUGE-L:
    CIDEr depends on the other rows); gap: probability of the right option less that of the best wrong one; piecewise:
    the gap times 200 where the right option wins, else times 180 (RLPrompt); likelihood: mean probability of the
    reference's tokens."""
    population: Annotated[int, Field(ge=2, le=1000)] = 8
    """Prompts that are alive (ape) or proposed (opro) at once, or scored per step (rl) or generation (bbt; its paper
    takes 20); mipro chooses among twice as many instructions."""
    minibatch: Annotated[int, Field(ge=1)] = 16
    """Dev rows of a first look at a prompt; the promising ones are scored on all."""
    shots: Annotated[int, Field(ge=0, le=32)] = 2
    """Most exemplars, where space has them."""
    pool: Annotated[int, Field(ge=1)] = 32
    """Training rows that may become exemplars, and whose mistakes gepa looks at; none shares a medium (by its bytes) or
    its text with a dev row."""
    verbalizers: tuple[dict[str, str], ...] = ()
    """Other words for the labels to choose from, such as {negative: terrible, positive: great}; the labels as they
    are is always a choice."""
    longest: Annotated[int, Field(ge=20)] = 600
    """Longest instruction in characters; a longer proposal is refused."""
    proposer: Literal["edits", "llm"] = "edits"
    """edits: rewrites by rule and what the examples show, offline; llm: a chat model, which is shown some training
    rows."""
    llm: ProposerModel | None = None
    """The chat model of proposer llm."""
    rl: Rl = Rl()
    """Settings of method rl."""
    bbt: Bbt = Bbt()
    """Settings of method bbt."""
    compare_random: bool = True
    """Also spend as many calls on random search, so that the report can say what the method was worth."""

    @field_validator("space")
    @classmethod
    def _some_part(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one part, each once")
        return value

    @field_validator("test_split")
    @classmethod
    def _not_the_dev_rows(cls, value: SplitName | None) -> SplitName | None:
        if value == "train":
            raise ValueError("the dev rows come from train: take val or test")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Prompt:
        if (self.proposer == "llm") != (self.llm is not None):
            raise ValueError("proposer llm and the section llm go together: give url and model, or leave both out")
        if "verbalizer" in self.space and not self.verbalizers:
            raise ValueError("space has verbalizer: give `verbalizers` to choose from")
        if "exemplars" in self.space and not self.shots:
            raise ValueError("space has exemplars: shots is at least 1")
        if self.method in ("rl", "bbt") and self.space != ("instruction",):
            raise ValueError(f"method {self.method} changes the instruction alone: leave out space")
        if self.method == "bbt" and self.on != "base":
            raise ValueError("method bbt puts its soft tokens before the base: leave out `on`")
        return self

"""A language model that learns to write the prompt: TRL's GRPO with the score of the prompt as reward.

The way of PRL (Batorski et al. 2025, arXiv:2505.14412) with adapters in place of whole weights: the model is asked
for an instruction, a group of its answers is scored, and GRPO (Shao et al. 2024, arXiv:2402.03300) makes the better
ones likelier. Needs TRL, from the extra ``preference``.

A search that was stopped takes the same steps again with the rewards of its trace: only the frozen model is not asked
again. Where the writer then writes something else, as it may on another machine, the trace refuses to go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmtune.prompts.search.candidate import Candidate
from mmtune.prompts.search.look import look, look_calls, look_rows
from mmtune.prompts.search.problem import Method, Problem
from mmtune.prompts.search.scorer import Scorer
from mmtune.prompts.search.space import Admission, slots_of


@dataclass(frozen=True)
class GrpoSettings:
    """The writer, and how it learns.

    Attributes:
        load: Returns a causal language model and its tokenizer; adapters are put into the model.
        request: What it is asked for.
        max_tokens: Longest prompt that it may write.
        rate: Learning rate of its adapters.
        lora_r: Their rank.
        temperature: Of its draws.
    """

    load: Callable[[], tuple[Any, Any]]
    request: str
    max_tokens: int = 64
    rate: float = 1e-5
    lora_r: int = 16
    temperature: float = 1.0


def written(text: str, start: Candidate) -> Candidate:
    """Returns the prompt of a written instruction: as it is where it has the start's slots, else before the start."""
    text = text.strip()
    slots = slots_of(start.instruction)
    if text and not (slots and slots <= slots_of(text)):
        text = f"{text}\n{start.instruction}"
    return replace(start, instruction=text)


class PromptReward:
    """The reward function that GRPO is given: what a written prompt scores.

    A prompt that was written before is not scored again; one that is refused earns as little as the worst so far.

    Args:
        problem: What is searched.
        scorer: Asks the model.
        admission: Refuses.
    """

    __name__ = "prompt_score"

    def __init__(self, problem: Problem, scorer: Scorer, admission: Admission) -> None:
        self._problem, self._scorer, self._admission = problem, scorer, admission
        self._dice = problem.dice("grpo")
        self._means: dict[str, float] = {}

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float | None]:
        """Returns one reward per completion, as TRL asks for.

        Raises:
            Exhausted: The budget is used up.
            DivergedError: A reward is no number.
        """
        prompts = [written(_text(each), self._problem.space.start) for each in completions]
        fresh = self._admission(prompts)
        if fresh:
            look(self._scorer, fresh, look_rows(self._problem, self._dice))
            self._means |= {prompt.key: self._scorer.mean(prompt) for prompt in fresh}
        worst = min(self._means.values(), default=0.0)
        return [self._means.get(prompt.key, worst) for prompt in prompts]


def _text(completion: Any) -> str:
    """Returns what was written, whichever of TRL's two forms it has."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def grpo_search(problem: Problem, scorer: Scorer, admission: Admission) -> None:
    """Trains the writer until the budget is used up, or twice as many prompts were written as it pays for.

    Raises:
        Exhausted: The budget is used up.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    settings: GrpoSettings = problem.settings
    model, tokenizer = settings.load()
    talks = getattr(tokenizer, "chat_template", None) is not None
    asked: Any = [{"role": "user", "content": settings.request}] if talks else settings.request
    paid = scorer.budget.left / min(problem.minibatch, problem.rows)
    with TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=problem.population,
            num_generations=problem.population,
            max_completion_length=settings.max_tokens,
            max_steps=math.ceil(2 * paid / problem.population),
            learning_rate=settings.rate,
            lr_scheduler_type="constant",
            temperature=settings.temperature,
            seed=problem.seed,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=PromptReward(problem, scorer, admission),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": asked}] * problem.population),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=settings.lora_r, lora_alpha=2 * settings.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.train()


METHOD = Method(grpo_search, lambda problem: look_calls(problem, problem.population), needs="trl", extra="preference")

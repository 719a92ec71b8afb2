"""A language model that learns to write the prompt: TRL's GRPO with the score of the prompt as reward.

The way of PRL (Batorski et al. 2025, arXiv:2505.14412) with adapters in place of whole weights: the model is asked
for an instruction, a group of its answers is scored, and GRPO (Shao et al. 2024, arXiv:2402.03300) makes the better
ones likelier. Needs TRL, from the extra ``preference``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.errors import CapabilityError
from mmtune.prompts.search.reward import check_finite


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """How the writer learns.

    Attributes:
        group: Prompts per step.
        max_tokens: Longest prompt that it may write.
        rate: Learning rate of its adapters.
        lora_r: Their rank.
        temperature: Of its draws.
    """

    group: int = 8
    max_tokens: int = 64
    rate: float = 1e-5
    lora_r: int = 16
    temperature: float = 1.0


def check_trl() -> None:
    """Raises CapabilityError unless TRL is installed."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise CapabilityError(
            "prompt.rl.policy: lm needs TRL", 'pip install "mmtune[preference]"', "missing_extra"
        ) from error


class PromptReward:
    """The reward function that GRPO is given: what a written prompt scores.

    A prompt that was written before is not scored again; one that is refused earns as little as the worst so far.

    Args:
        score: Prompts to ``(C, N)`` rewards on the same N inputs.
        most: Prompts that may be scored.
        refuse: A prompt to the reason why it may not be scored, or nothing.

    Attributes:
        known: Rewards of every prompt that was scored, in order.
        refused: Reason to the number of prompts that were thrown away.
    """

    __name__ = "prompt_score"

    def __init__(
        self, score: Callable[[Sequence[str]], np.ndarray], *, most: int, refuse: Callable[[str], str]
    ) -> None:
        self._score, self._most, self._refuse = score, most, refuse
        self.known: dict[str, np.ndarray] = {}
        self.refused: Counter[str] = Counter()

    @property
    def spent(self) -> bool:
        """Whether no further prompt may be scored."""
        return len(self.known) >= self._most

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        """Returns one reward per completion, as TRL asks for.

        Raises:
            DivergedError: A reward is no number.
        """
        texts = [_text(each) for each in completions]
        fresh = self._fresh(texts)
        if fresh:
            reward_CN = self._score(fresh)
            check_finite(reward_CN, fresh)
            self.known.update(zip(fresh, reward_CN, strict=True))
        means = {text: float(reward_N.mean()) for text, reward_N in self.known.items()}
        worst = min(means.values(), default=0.0)
        return [means.get(text, worst) for text in texts]

    def _fresh(self, texts: Sequence[str]) -> list[str]:
        fresh: dict[str, None] = {}
        for text in texts:
            if text in self.known or text in fresh:
                self.refused["duplicate"] += 1
            elif reason := self._refuse(text):
                self.refused[reason] += 1
            elif len(self.known) + len(fresh) < self._most:
                fresh[text] = None
        return list(fresh)


def _text(completion: Any) -> str:
    """Returns what was written, whichever of TRL's two forms it has."""
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()


def learn_to_write(
    model: Any,
    tokenizer: Any,
    request: str,
    reward: PromptReward,
    *,
    settings: GrpoSettings,
    most: int,
    seed: int,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains adapters on a language model until the reward's prompts are spent, or as many steps were made.

    Args:
        model: A causal language model, in memory; adapters are put into it.
        tokenizer: Its own.
        request: What it is asked for: the task, and that one instruction is wanted.
        reward: Scores what it writes, and keeps it.
        settings: How it learns.
        most: Prompts that may be scored; no more are written than twice as many.
        seed: Of everything random.
        folder: Scratch of the trainer; nothing in it is needed afterwards.
        should_stop: Asked after every step.

    Raises:
        CapabilityError: TRL is not installed.
        DivergedError: A reward is no number.
    """
    check_trl()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class UntilSpent(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = reward.spent or should_stop()
            return control

    talks = getattr(tokenizer, "chat_template", None) is not None
    prompt: Any = [{"role": "user", "content": request}] if talks else request
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.group,
        num_generations=settings.group,
        max_completion_length=settings.max_tokens,
        max_steps=2 * math.ceil(most / settings.group),
        learning_rate=settings.rate,
        temperature=settings.temperature,
        seed=seed,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt}] * settings.group),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=2 * settings.lora_r, task_type="CAUSAL_LM"),
        callbacks=[UntilSpent()],
    )
    trainer.train()

"""The writer that learns by TRL's own GRPO, and the reward function that it is given."""

import sys

import numpy as np
import pytest

from mmtune.errors import CapabilityError
from mmtune.prompts.search import Admission, Budget, Candidate, Exhausted, Problem, Scorer, Space, Trace, search
from mmtune.prompts.search.grpo import METHOD, GrpoSettings, PromptReward, written

ROWS = 4


def digits(candidate, rows):
    """Rewards prompts for the share of digits among their characters."""
    text = candidate.instruction
    return [sum(letter.isdigit() for letter in text) / len(text) + 0.001 * row for row in rows]


def problem(population=4, settings=None):
    return Problem(
        Space(Candidate("{prompt}")), None, rows=ROWS, population=population, minibatch=ROWS, settings=settings
    )


def test_the_reward_is_the_score_in_the_order_of_the_completions():
    calls = []

    def score(candidate, rows):
        calls.append((candidate.instruction, len(rows)))
        return digits(candidate, rows)

    scorer = Scorer(score, ROWS, Budget(100))
    scorer(Candidate("{prompt}"))
    admission = Admission(Space(Candidate("{prompt}")))
    reward = PromptReward(problem(), scorer, admission)
    given = [" 12 ", [{"role": "assistant", "content": "a{stray"}], "no", "12", ""]
    got = reward(completions=given, prompts=["x"] * 5, completion_ids=[])
    mean = {text: float(np.mean(digits(Candidate(text), range(ROWS)))) for text in ("12\n{prompt}", "no\n{prompt}")}
    worst = min(mean.values())
    assert got == pytest.approx([mean["12\n{prompt}"], worst, mean["no\n{prompt}"], mean["12\n{prompt}"], worst])
    assert calls == [("{prompt}", ROWS), ("12\n{prompt}", ROWS), ("no\n{prompt}", ROWS)]
    assert dict(admission.refused) == {"stray_brace": 1, "duplicate": 1, "empty": 1}
    assert scorer.best.candidate.instruction == "12\n{prompt}"


def test_a_used_up_budget_ends_the_training():
    scorer = Scorer(digits, ROWS, Budget(ROWS + 1))
    scorer(Candidate("{prompt}"))
    with pytest.raises(Exhausted):
        PromptReward(problem(), scorer, Admission(Space(Candidate("{prompt}"))))(completions=["1"])


def test_a_written_prompt_with_the_slots_stands_as_it_is():
    assert written(" Look: {prompt} ", Candidate("{prompt}")).instruction == "Look: {prompt}"
    assert written("Look.", Candidate("{prompt}")).instruction == "Look.\n{prompt}"
    assert written(" ", Candidate("{prompt}")).instruction == ""


def test_without_trl_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(CapabilityError, match="rl_lm needs trl") as caught:
        search(problem(), Scorer(digits, ROWS, Budget(100)), METHOD, "rl_lm")
    assert caught.value.exit_code == 4 and "mmtune[preference]" in caught.value.hint


TOKENS = ["[pad]", "[end]", "[other]", "look", "say", "what", "is", "the", "digit", "1", "2", "3"]


def tiny_writer():
    """Returns a writer that knows nothing, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate(TOKENS)}, unk_token="[other]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[pad]", eos_token="[end]")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**small, vocab_size=len(TOKENS), pad_token_id=0, eos_token_id=1, initializer_range=0.1)
    return LlamaForCausalLM(config), tokenizer


SETTINGS = GrpoSettings(tiny_writer, "say what", max_tokens=6, rate=3e-2)


@pytest.mark.slow
def test_grpo_makes_the_better_prompts_likelier():
    scorer = Scorer(digits, ROWS, Budget(160 * ROWS))
    found = search(problem(8, SETTINGS), scorer, METHOD, "rl_lm")
    assert found.calls == scorer.budget.spent <= 160 * ROWS
    scores = [one.score for one in scorer.full]
    third = len(scores) // 3
    assert third > 10 and np.mean(scores[-third:]) > np.mean(scores[:third]) + 0.05, scores


@pytest.mark.slow
def test_a_writer_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    """Its weights are not kept: it writes and learns the same again, and what models said is not asked again."""

    def searched(path):
        calls = []
        scorer = Scorer(lambda *given: calls.append(given) or digits(*given), ROWS, Budget(40 * ROWS), Trace(path))
        found = search(problem(8, SETTINGS), scorer, METHOD, "rl_lm")
        scorer.trace.close()
        return found, calls, path.read_text()

    found, calls, whole = searched(tmp_path / "whole")
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(calls) + 1 > 20
    (tmp_path / "cut").write_text("".join(lines[:15]) + lines[15][:9])
    same, fewer, text = searched(tmp_path / "cut")
    assert (same, text) == (found, whole) and len(fewer) == len(calls) - 14

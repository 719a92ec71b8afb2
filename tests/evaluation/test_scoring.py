"""Rows scored through tries have the log-probabilities of rows run alone, in every family, with fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtune.encoding.collate import Collator
from mmtune.evaluation.generation import Stopped, answer_losses
from mmtune.evaluation.options import by_media, score_options, score_words
from mmtune.evaluation.ranking import Question
from mmtune.evaluation.scoring import Calls, RowScorer
from mmtune.records import Medium, Message, TextPart

OPTIONS = ("red", "blue and white", "blue", "three of them, hello world!")
OWNERS = (0, 1, 1, 2)
QUESTIONS = ("What colour is the cat?", "How many?", "Is it red, or is it blue, or white?")


def questions_of(family: Any, media: Any, served: dict[str, Any]) -> list[Question]:
    """Questions that share media, one with media behind its text, and two of text alone."""

    def shown(number: int) -> list[Any]:
        parts = []
        for kind in sorted(family.takes):
            made, real = media.of(kind, number)
            served[made.path] = real[kind]
            parts.append(made)
        return parts

    first, second = shown(0), shown(1)
    prompts = [(*first, TextPart(question)) for question in QUESTIONS]
    prompts += [(*second, TextPart(question)) for question in QUESTIONS[:2]]
    prompts += [(TextPart("Look: "), *shown(2), TextPart(" which?"))] if family.takes else []
    prompts += [(TextPart("Hello world"),), (TextPart("Hello world, again"),)]
    return [Question(at, (Message("user", tuple(parts)),), "", OPTIONS, OWNERS) for at, parts in enumerate(prompts)]


def alone(family: Any, model: Any, questions: Sequence[Question], missing: Sequence[str] = ()) -> np.ndarray:
    """Returns the log-probability of every (question, word), one row per forward pass."""
    rows = [family.renderer.encode(question.conversation(at)) for question in questions for at in range(len(OPTIONS))]
    nll, _ = answer_losses(
        model,
        lambda chosen: [rows[at] for at in chosen],
        Collator(family.processor, media_root=Path()).without(missing),
        sizes=[row.input_ids.size for row in rows],
        batch_rows=1,
    )
    return -nll


def pairs(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(question, at) for question in questions for at in range(len(question.words))]


def assert_scores_of_rows(
    family: Any, model: Any, questions: Sequence[Question], share: float = 0.5, missing: Sequence[str] = ()
) -> RowScorer:
    """Compares tries with rows alone; ``share`` of the tokens at most may have run."""
    notes: list[str] = []
    collate = Collator(family.processor, media_root=Path()).without(missing)
    scorer = RowScorer(model, collate, note=notes.append)
    found = score_words(scorer, family.renderer.encode, pairs(questions))
    expected = alone(family, model, questions, missing)
    assert notes == []
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5) and len(set(expected.round(3))) > len(questions)
    assert scorer.calls.rows == len(expected)
    # What the check ran alone is counted too; again without it.
    before = scorer.calls
    again = score_words(scorer, family.renderer.encode, pairs(questions))
    assert again == pytest.approx(found, rel=1e-6)
    assert scorer.calls.tokens - before.tokens <= share * (scorer.calls.apart - before.apart)
    return scorer


def test_every_family(family_name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = copy(tiny_family(family_name))
    reads = getattr(family.model.config, "reads_prompt", None)
    if reads is not None:
        family.processor = deepcopy(family.processor)
        family.processor.reads_prompt = reads
    assert_scores_of_rows(family, family.model, questions_of(family, media, served))


def composite_of(fusion: dict[str, Any], tiny_family: Any) -> tuple[Any, Any]:
    """A composite family and a model of it whose gates are open and whose passes say different things."""
    from tests.training.conftest import _composite

    family = deepcopy(tiny_family("composite"))
    torch.manual_seed(0)
    model = _composite(**fusion)(family.processor, family.processor.tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate") or parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return family, model


@pytest.mark.parametrize("fusion", [{"attention": "self"}, {"attention": "co", "layers": [0, 1]}])
def test_fusions_that_read_the_prompt_share_whole_prompts(
    fusion: dict[str, Any], tiny_family: Any, media: Any, served: Any
) -> None:
    family, model = composite_of(fusion, tiny_family)
    family.processor.reads_prompt = True
    assert_scores_of_rows(family, model, questions_of(family, media, served), share=0.6)
    # Told nothing of it, the check finds out.
    family.processor.reads_prompt = False
    notes: list[str] = []
    scorer = RowScorer(model, Collator(family.processor, media_root=Path()), note=notes.append)
    score_words(scorer, family.renderer.encode, pairs(questions_of(family, media, served)))
    assert notes and "differ" in notes[0]


@pytest.mark.parametrize("missing", ["image", "audio"])
@pytest.mark.parametrize(
    "fusion",
    [
        {},
        {"mode": "late"},
        {"mode": "hybrid", "instruction": True},
        {"attention": "cross", "layers": [1]},
        {"attention": "self"},
        {"attention": "co", "layers": [0, 1]},
    ],
    ids=lambda fusion: "-".join(map(str, fusion.values())) or "early",
)
def test_a_missing_modality_is_hidden_in_tries_too(
    fusion: dict[str, Any], missing: str, tiny_family: Any, media: Any, served: Any
) -> None:
    family, model = composite_of(fusion, tiny_family)
    family.processor.reads_prompt = model.config.reads_prompt
    questions = questions_of(family, media, served)
    assert_scores_of_rows(family, model, questions, share=0.6, missing=[missing])
    seen, hidden = alone(family, model, questions), alone(family, model, questions, [missing])
    assert np.abs(seen - hidden).max() > 1e-3


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix", "ia3", "lora"])
@pytest.mark.parametrize("name", ["text_llama3", "llava", "llava_bytes"])
def test_tuned_models(name: str, method: str, tiny_family: Any, media: Any, served: Any) -> None:
    from mmtune.models.method import with_method

    family = tiny_family(name)
    torch.manual_seed(3)
    lora = {"targets": None, "r": 4, "alpha": 8}
    model = with_method(deepcopy(family.model), method, towers=["llm"], lora=lora, virtual_tokens=5, base_path="")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert_scores_of_rows(family, model.eval(), questions_of(family, media, served))


def test_options_are_labels_with_all_their_words(tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family("llava")
    questions = questions_of(family, media, served)
    scorer = RowScorer(family.model, Collator(family.processor, media_root=Path()))
    found = score_options(scorer, family.renderer.encode, questions[:2])
    words = alone(family, family.model, questions[:2]).reshape(2, -1)
    for scores_L, logprob_W in zip(found, words, strict=True):
        wanted = [np.exp(logprob_W[0]), np.exp(logprob_W[1]) + np.exp(logprob_W[2]), np.exp(logprob_W[3])]
        assert np.exp(scores_L) == pytest.approx(wanted, rel=1e-4)
    assert score_options(scorer, family.renderer.encode, []) == []
    assert scorer.calls.rows == 2 * len(OPTIONS)


def test_layers_that_take_no_mask_are_run_row_by_row(tiny_family: Any, monkeypatch: Any) -> None:
    family = tiny_family("text_qwen3")
    model = deepcopy(family.model)
    monkeypatch.setattr(model.config, "layer_types", ["linear_attention", "full_attention"])
    # The layers themselves go on as they are; the config alone says that they would not take a mask.
    notes: list[str] = []
    scorer = RowScorer(model, Collator(family.processor, media_root=Path()), batch_rows=2, note=notes.append)
    questions = questions_of(family, None, {})
    monkeypatch.setattr(model.config, "layer_types", ["full_attention", "full_attention"])
    found = score_words(scorer, family.renderer.encode, pairs(questions))
    assert found == pytest.approx(alone(family, family.model, questions), rel=1e-5)
    assert len(notes) == 1 and "linear_attention" in notes[0]
    assert scorer.calls.tokens == scorer.calls.apart and scorer.calls.passes == len(found) // 2


def test_passes_are_counted(tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family("llava")
    model = deepcopy(family.model)
    called: list[int] = []
    model.register_forward_pre_hook(lambda *_: called.append(1))
    scorer = RowScorer(model, Collator(family.processor, media_root=Path()))
    score_words(scorer, family.renderer.encode, pairs(questions_of(family, media, served)))
    assert scorer.calls.passes == len(called) > 0
    assert Calls(1, 2, 3, 4) + Calls(1, 1, 1, 1) == Calls(2, 3, 4, 5)


def test_a_long_instruction_is_run_once_for_rows_of_text(tiny_family: Any) -> None:
    family = tiny_family("text_llama3")
    start = "Say whether the cat is red or blue. " * 12
    questions = [
        Question(at, (Message("user", (TextPart(f"{start}Row {at}"),)),), "", ("red", "blue"), (0, 1))
        for at in range(20)
    ]
    scorer = RowScorer(family.model, Collator(family.processor, media_root=Path()))
    found = score_words(scorer, family.renderer.encode, pairs(questions))
    rows = [family.renderer.encode(question.conversation(at)) for question, at in pairs(questions)]
    nll, _ = answer_losses(
        family.model, lambda chosen: [rows[at] for at in chosen], Collator(family.processor, media_root=Path()),
        sizes=[row.input_ids.size for row in rows], batch_rows=8,
    )  # fmt: skip
    assert found == pytest.approx(-nll, rel=1e-5)
    assert scorer.calls.apart > 5 * scorer.calls.tokens


def test_a_stop_is_obeyed(tiny_family: Any) -> None:
    family = tiny_family("text_llama3")
    scorer = RowScorer(family.model, Collator(family.processor, media_root=Path()), should_stop=lambda: True)
    with pytest.raises(Stopped):
        score_words(scorer, family.renderer.encode, pairs(questions_of(family, None, {})))


def test_rows_are_ordered_by_what_they_show_first() -> None:
    a, b = Medium("image", "a.png"), Medium("image", "b.png")
    assert by_media([[a], [b], [a, b], [], [a], [b]]) == [3, 0, 4, 2, 1, 5]


@pytest.mark.parametrize("name", ["text_llama3", "llava_bytes", "qwen3_vl", "gemma3", "internvl", "composite_late"])
def test_a_coarse_type_is_measured_against_itself(name: str, tiny_family: Any, media: Any, served: Any) -> None:
    family = copy(tiny_family(name))
    if hasattr(family.processor, "reads_prompt"):
        family.processor = deepcopy(family.processor)
        family.processor.reads_prompt = False
    model = deepcopy(family.model).to(torch.bfloat16)
    questions = questions_of(family, media, served)
    notes: list[str] = []
    scorer = RowScorer(model, Collator(family.processor, media_root=Path()), note=notes.append)
    found = score_words(scorer, family.renderer.encode, pairs(questions))
    expected, rows = alone(family, family.model, questions), alone(family, model, questions)
    assert notes == []
    # As far from fp32 as rows are.
    assert np.abs(found - expected).max() < 2 * np.abs(rows - expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_positions_are_seen(dtype: torch.dtype, tiny_family: Any, media: Any, served: Any) -> None:
    family = tiny_family("qwen2_vl")
    notes: list[str] = []
    model = deepcopy(family.model).to(dtype)
    scorer = RowScorer(model, Collator(family.processor, media_root=Path()), note=notes.append)
    scorer._rope = None
    questions = questions_of(family, media, served)
    found = score_words(scorer, family.renderer.encode, pairs(questions))
    assert len(notes) == 1 and "differ" in notes[0]
    if dtype == torch.float32:
        assert found == pytest.approx(alone(family, model, questions), rel=1e-5)

"""Histories through the tower of a composite model: as the encoder alone reads them, saved whole, generated from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from mmtune.encoding.processor import load_processor, processor_fingerprint
from mmtune.errors import CapabilityError, RecipeError
from mmtune.models.composite.assemble import assemble
from mmtune.models.composite.processor import CompositeProcessor
from mmtune.models.encoders import HistoryConfig, HistoryModel
from mmtune.models.inputs import FIRST_ITEM, ITEMS, NO_ITEM, PADDING, UNKNOWN_ITEM
from mmtune.models.load import load_model
from tests.models.composite.test_assemble import SMALL, language
from tests.training.conftest import encoding_tests

__all__ = ["language"]
ITEMS_KNOWN = [f"film {number}" for number in range(20)]


def config(**more: Any) -> HistoryConfig:
    return HistoryConfig(**SMALL, vocab_size=FIRST_ITEM + len(ITEMS_KNOWN), window=6, **more)


def joined(language: Path, encoder: Any = None, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    return assemble(
        str(language),
        encoders={"behaviour": encoder or config()},
        preprocessors=None if isinstance(encoder, str) else {"behaviour": ITEMS_KNOWN},
        **more,
    )


def given(processor: Any, *histories: list[str]) -> Any:
    parts = [*({"type": "behaviour"} for _ in histories), {"type": "text", "text": "Will they like it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(text=text, histories=histories, return_tensors="pt")


def test_features_are_those_of_the_encoder_alone_whatever_stands_beside(language: Path) -> None:
    model, processor = joined(language, projectors={"behaviour": {"kind": "linear"}})
    histories = [ITEMS_KNOWN[:2], ITEMS_KNOWN[3:9], []]
    ids, texts = processor.process_histories(histories)
    together = model.get_behaviour_features(torch.from_numpy(ids)).pooler_output
    assert [len(own) for own in together] == [text.count(processor.behaviour_token) for text in texts] == [2, 6, 1]
    for items, own in zip(histories, together, strict=True):
        alone = torch.from_numpy(processor.process_histories([items])[0])
        tower = model.model.behaviour_tower(alone).last_hidden_state
        torch.testing.assert_close(own, model.model.behaviour_projector(tower)[0])
    turned = torch.from_numpy(processor.process_histories([ITEMS_KNOWN[:2][::-1]])[0])
    other = model.get_behaviour_features(turned).pooler_output[0]
    assert (other.mean(0) - together[0].mean(0)).abs().max() > 1e-5


def test_an_unknown_item_says_nothing_at_first(language: Path) -> None:
    model, processor = joined(language)
    embedded = model.model.behaviour_tower.item_embedding.weight
    assert not embedded[UNKNOWN_ITEM].any() and embedded[FIRST_ITEM:].any(1).all()
    ids, _ = processor.process_histories([["never seen"], ["nor this"]])
    assert ids.tolist() == [[UNKNOWN_ITEM], [UNKNOWN_ITEM]]


def test_training_shows_unknown_items_at_the_rate_that_is_set() -> None:
    torch.manual_seed(0)
    tower, seen = HistoryModel(config(unknown_rate=0.3)), []
    tower.item_embedding.register_forward_hook(lambda _, given, made: seen.append(given[0]))
    ids = torch.full((50, 40), FIRST_ITEM + 1)
    ids[:, 30:] = PADDING
    ids[0] = NO_ITEM
    tower.eval()(ids)
    tower.train()(ids)
    assert torch.equal(seen[0], ids)
    tower.item_embedding.requires_grad_(False)
    tower(ids)
    assert torch.equal(seen[2], ids)
    changed = seen[1] != ids
    assert (seen[1][changed] == UNKNOWN_ITEM).all() and not changed[:, 30:].any() and not changed[0].any()
    assert changed[1:, :30].float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("kind", ["mlp", "perceiver"])
@pytest.mark.parametrize("mode", ["early", "late", "hybrid"])
def test_a_folder_like_any_other(language: Path, tmp_path: Path, kind: str, mode: str) -> None:
    own = {"kind": kind, **({} if kind == "mlp" else {"queries": 3, "heads": 4})}
    model, processor = joined(language, projectors={"behaviour": own}, fusion={"mode": mode})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = load_model(str(tmp_path)), load_processor(str(tmp_path))
    assert isinstance(reader, CompositeProcessor) and reader.items == ITEMS_KNOWN and reader.history_items == 6
    assert processor_fingerprint(reader) == processor_fingerprint(processor)
    batch = given(reader, ITEMS_KNOWN[:8], ["never seen"])
    assert (batch["input_ids"] == reader.behaviour_token_id).sum() == (7 if kind == "mlp" else 6)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
    words = again.generate(**batch, max_new_tokens=3, do_sample=False)
    without = again.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    assert words.shape[1] == batch["input_ids"].shape[1] + 3 and torch.equal(words, without)


def test_beams_repeat_the_history_of_a_row_and_refuse_several(language: Path) -> None:
    model, processor = joined(language)
    batch = given(processor, ITEMS_KNOWN[:4])
    asked = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    found, without = model.generate(**batch, **asked), model.generate(**batch, **asked, use_cache=False)
    assert torch.equal(found, without)
    with pytest.raises(CapabilityError, match="rows of one behaviour medium at most"):
        model.generate(**given(processor, ITEMS_KNOWN[:4], ITEMS_KNOWN[4:8]), **asked)


def test_other_items_are_another_processor(language: Path) -> None:
    _, processor = joined(language)
    before = processor_fingerprint(processor)
    processor.items = ITEMS_KNOWN[::-1]
    assert processor_fingerprint(processor) != before


def test_places_and_histories_must_be_as_many(language: Path) -> None:
    _, processor = joined(language)
    with pytest.raises(ValueError, match="<behaviour> 1 times, and 2 histories"):
        processor(text="<behaviour>?", histories=[["film 1"], ["film 2"]])
    for text in ("<behaviour>?", ["none", "<behaviour>?"]):
        with pytest.raises(ValueError, match="<behaviour> 1 times, and 0 histories"):
            processor(text=text)
    with pytest.raises(ValueError, match="<behaviour> 1 times, and 0 histories"):
        processor(None, "<behaviour>?")
    with pytest.raises(ValueError, match="a list of items, each a string, not 'film 1'"):
        processor(text="<behaviour>?", histories=["film 1"])
    assert "history_ids" not in processor(text="none")
    batch = processor(text=["<behaviour>a", "b<behaviour>"], histories=[["film 1"], ["film 2", "film 3"]], padding=True)
    rows = [[one == processor.behaviour_token_id for one in row] for row in batch["input_ids"]]
    assert [sum(row) for row in rows] == [1, 2] and batch["history_ids"].shape == (2, 2)


def test_histories_are_read_from_the_parts_of_messages(language: Path) -> None:
    model, processor = joined(language)
    first, second, asked = ITEMS_KNOWN[:3], ["never seen"], {"type": "text", "text": "Will they like it?"}
    parts = [{"type": "behaviour", "behaviour": items} for items in (first, second, [])]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor.apply_chat_template([{"role": "user", "content": [*parts, asked]}], **how)
    expected = given(processor, first, second, [])
    assert set(made) == set(expected) and all(torch.equal(made[name], expected[name]) for name in made)
    talks = [[{"role": "user", "content": [part, asked]}] for part in parts[:2]]
    several = processor.apply_chat_template(talks, **how, processor_kwargs={"padding": True})
    assert torch.equal(
        several["history_ids"],
        processor(text="<behaviour>" * 2, histories=[first, second], return_tensors="pt")["history_ids"],
    )
    named = [{"role": "user", "content": [{"type": "behaviour"}, asked]}]
    apart = processor.apply_chat_template(named, **how, processor_kwargs={"histories": [first]})
    assert torch.equal(apart["history_ids"], several["history_ids"][:1])
    with pytest.raises(ValueError, match="<behaviour> 1 times, and 0 histories"):
        processor.apply_chat_template(named, **how)
    with pytest.raises(ValueError, match="give them once"):
        processor.apply_chat_template(talks[0], **how, processor_kwargs={"histories": [first]})
    assert model.generate(**made, max_new_tokens=2, do_sample=False).shape[1] == made["input_ids"].shape[1] + 2


def test_any_encoder_of_ids_reads_histories(language: Path) -> None:
    """BERT's, whose positions end the history that it can read."""
    bert = BertConfig(**SMALL, vocab_size=FIRST_ITEM + len(ITEMS_KNOWN), max_position_embeddings=7)
    model, processor = joined(language, bert, projectors={"behaviour": {"kind": "linear"}})
    assert processor.history_items == 7
    ids, texts = processor.process_histories([ITEMS_KNOWN, ITEMS_KNOWN[:3]])
    made = model.get_behaviour_features(torch.from_numpy(ids)).pooler_output
    assert [len(own) for own in made] == [text.count(processor.behaviour_token) for text in texts] == [7, 3]
    alone = model.model.behaviour_tower(torch.from_numpy(ids[1:, :3])).last_hidden_state
    torch.testing.assert_close(made[1], model.model.behaviour_projector(alone)[0])


def test_an_encoder_that_extract_wrote_is_taken_with_its_items(language: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    tower = HistoryModel(config())
    tower.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=f"has no {ITEMS}"):
        joined(language, str(tmp_path))
    (tmp_path / ITEMS).write_text(json.dumps(ITEMS_KNOWN), "utf-8")
    model, processor = joined(language, str(tmp_path))
    assert processor.items == ITEMS_KNOWN
    for name, own in tower.named_parameters():
        assert torch.equal(model.model.behaviour_tower.get_parameter(name), own), name
    (tmp_path / ITEMS).write_text(json.dumps([*ITEMS_KNOWN, "one more"]), "utf-8")
    with pytest.raises(RecipeError, match="23 ids, too few for 21 items"):
        joined(language, str(tmp_path))


def test_a_tower_of_another_composite_model_is_taken_with_its_items(language: Path, tmp_path: Path) -> None:
    first, processor = joined(language)
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, reader = joined(language, str(tmp_path))
    assert reader.items == ITEMS_KNOWN
    expected = first.model.behaviour_tower.item_embedding.weight
    assert torch.equal(model.model.behaviour_tower.item_embedding.weight, expected)


def test_processors_without_histories_are_what_they_were() -> None:
    own = encoding_tests().family("composite_whisper").processor
    assert own.items is None and own.behaviour_token is None and "history_ids" not in own.model_input_names

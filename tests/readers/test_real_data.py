"""Every real file of the shared datasets, read whole: the counts are those of their SOURCE.md."""

from collections import Counter
from pathlib import Path

import pytest

from mmtune.readers import find_reader
from mmtune.readers.source import SourceFiles
from mmtune.records import Record, Reject

VQA = "vqa_v2_subset"
LF = "llamafactory_demo"
EASY = {"question": 0, "answer": 1, "image": "images/{2}.png"}
PATHS = ("path", "questions", "annotations", "images", "audios", "videos")

CASES = {
    # name: (reader, fields, records, rejects by reason)
    "vqa with images": (
        "vqa_v2",
        {
            "questions": f"{VQA}/with_images/v2_OpenEnded_mscoco_train2014_questions.json",
            "annotations": f"{VQA}/with_images/v2_mscoco_train2014_annotations.json",
            "images": f"{VQA}/with_images/train2014",
        },
        73,
        {},
    ),
    "vqa train gz": (
        "vqa_v2",
        {"questions": f"{VQA}/vqa_questions_train.json.gz", "annotations": f"{VQA}/vqa_annotations_train.json.gz"},
        48030,
        {},
    ),
    "vqa valid gz": (
        "vqa_v2",
        {"questions": f"{VQA}/vqa_questions_valid.json.gz", "annotations": f"{VQA}/vqa_annotations_valid.json.gz"},
        8970,
        {},
    ),
    "vqa oracle": (
        "vqa_v2",
        {
            "questions": "vqa_eval_oracle/v2_OpenEnded_mscoco_val2014_questions.json",
            "annotations": "vqa_eval_oracle/v2_mscoco_val2014_annotations.json",
            "split": "val",
        },
        400,
        {},
    ),
    "vqa without annotations": (
        "vqa_v2",
        {"questions": "vqa_eval_oracle/v2_OpenEnded_mscoco_val2014_questions.json", "split": "test"},
        400,
        {},
    ),
    "coco train": (
        "coco_captions",
        {"annotations": "coco_captions_mini/annotations/captions_train2017.json"},
        275,
        {},
    ),
    "coco val": (
        "coco_captions",
        {"annotations": "coco_captions_mini/annotations/captions_val2017.json", "split": "val"},
        24,
        {},
    ),
    "coco 2500 gz": (
        "coco_captions",
        {"annotations": "coco_captions_mini/captions_only/captions_val2017_2500.json.gz", "split": "test"},
        2500,
        {},
    ),
    "flickr token": ("flickr30k", {"path": "flickr30k_captions/results_test.token"}, 5000, {}),
    "flickr json": ("flickr30k", {"path": "flickr30k_captions/test.json", "split": "test"}, 1000, {}),
    "chartqa human": ("chartqa", {"path": "chartqa/test_human.json", "split": "test"}, 238, {}),
    "chartqa augmented": ("chartqa", {"path": "chartqa/test_augmented.json", "split": "test"}, 253, {}),
    "llava celeba": ("llava", {"path": "llava_format_lmms_finetune/celeba_image_train.json"}, 70, {}),
    "llava multi": ("llava", {"path": "llava_format_lmms_finetune/multi_images.json"}, 1, {}),
    "llava single": ("llava", {"path": "llava_format_lmms_finetune/single_image.json"}, 2, {}),
    "llava mixed": ("llava", {"path": "llava_format_lmms_finetune/single_image_has_text_only.json"}, 4, {}),
    "llava qa90": ("alpaca", {"path": "llava_playground/coco2014_val_gpt4_qa_30x3.jsonl"}, 90, {}),
    "llava bench": (
        "table",
        {
            "path": "llava_playground/qa90_questions.jsonl",
            "split": "test",
            "columns": {"id": "question_id", "image": "image", "question": "text", "metadata": "category"},
        },
        60,
        {},
    ),
    "lf alpaca": ("alpaca", {"path": f"{LF}/alpaca_en_demo.json"}, 999, {}),
    "lf identity": ("alpaca", {"path": f"{LF}/identity.json"}, 91, {}),
    "lf dpo": ("sharegpt", {"path": f"{LF}/dpo_en_demo.json"}, 300, {}),
    "lf kto": ("sharegpt", {"path": f"{LF}/kto_en_demo.json"}, 150, {"not_preferred": 150}),
    "lf glaive": ("sharegpt", {"path": f"{LF}/glaive_toolcall_en_demo.json"}, 300, {}),
    "lf mllm": ("sharegpt", {"path": f"{LF}/mllm_demo.json"}, 6, {}),
    "lf video": ("sharegpt", {"path": f"{LF}/mllm_video_demo.json"}, 3, {}),
    "lf audio": ("sharegpt", {"path": f"{LF}/mllm_audio_demo.json"}, 3, {}),
    "lf video audio": ("sharegpt", {"path": f"{LF}/mllm_video_audio_demo.json"}, 3, {}),
    "lf reasoning tools": ("messages", {"path": f"{LF}/reason_tool_use_demo_50.jsonl"}, 50, {}),
    "lf v1 sft": ("messages", {"path": f"{LF}/v1_sft_demo.jsonl"}, 500, {}),
    "lf v1 dpo": ("messages", {"path": f"{LF}/v1_dpo_demo.jsonl"}, 10, {}),
    "lf v1 multimodal": (
        "messages",
        {"path": f"{LF}/v1_multimodal_demo.jsonl", "columns": {"strip": "data/"}},
        24,
        {},
    ),
    "lf c4": ("table", {"path": f"{LF}/c4_demo.jsonl", "columns": {"output": "text"}}, 300, {}),
    "lf wiki": ("table", {"path": f"{LF}/wiki_demo.txt", "columns": {"output": "text"}}, 30, {}),
    "easy train": ("table", {"path": "easy_vqa/train/questions.json", "columns": EASY}, 19210, {}),
    "easy test": ("table", {"path": "easy_vqa/test/questions.json", "columns": EASY, "split": "test"}, 3898, {}),
    "gsm8k": (
        "table",
        {"path": "gsm8k/train.jsonl", "columns": {"question": "question", "answer": "answer"}},
        1200,
        {},
    ),
    "tabmwp": (
        "table",
        {
            "path": "tabmwp/problems_dev1k.json",
            "images": "tabmwp",
            "columns": {
                "id": "key",
                "question": "question",
                "answer": "answer",
                "options": "choices",
                "image": "tables/{key}.png",
                "metadata": ["ques_type", "unit"],
            },
        },
        400,
        {},
    ),
    "opencqa": (
        "table",
        {
            "path": "opencqa/val_extended.json",
            "split": "val",
            "columns": {"image": 0, "question": 4, "answer": 5, "references": [5, 6]},
        },
        110,
        {},
    ),
    "meld": (
        "table",
        {
            "path": "meld/train_sent_emo.csv",
            "columns": {"text": "Utterance", "answer": "Emotion", "metadata": "Speaker"},
        },
        9989,
        {},
    ),
    "esc50": (
        "table",
        {
            "path": "speech_asr_mini/ESC50/esc50.csv",
            "columns": {"audio": "filename", "answer": "category"},
        },
        5,
        {},
    ),
    "asr": (
        "table",
        {
            "path": "speech_asr_mini/annotation/ASR_dev.json",
            "audios": "speech_asr_mini/ASR",
            "columns": {
                "id": "key",
                "question": "=What is being said?",
                "audio": "wav",
                "answer": "words",
                "strip": "{data_root}/",
            },
        },
        2,
        {},
    ),
    "ikea": (
        "table",
        {"path": "ikea_room_items/items.jsonl", "columns": {"image": "image", "answer": "category"}},
        109,
        {},
    ),
    "xquad": ("squad", {"path": "xquad/xquad.en.json"}, 1190, {}),
    "squad oracle": ("squad", {"path": "squad_eval_oracle/dataset.json"}, 404, {}),
    "wnut17 train": ("conll", {"path": "wnut17/wnut17train.conll"}, 3394, {}),
    "wnut17 dev": ("conll", {"path": "wnut17/emerging.dev.conll", "split": "val"}, 1009, {}),
    "rt_polarity": ("rt_polarity", {"path": "rt_polarity"}, 10662, {}),
    "tweeteval train": ("tweeteval", {"path": "tweeteval_emotion"}, 3257, {}),
    "tweeteval test": ("tweeteval", {"path": "tweeteval_emotion", "split": "test"}, 1421, {}),
    "t0": ("t0", {"path": "t0_templates"}, 920, {}),
    "mustard": (
        "table",
        {"path": "mustard/sarcasm_data.json", "columns": {"text": "utterance", "answer": "sarcasm"}},
        490,
        {},
    ),
    "clothing": ("folder", {"path": "clothing/train"}, 160, {}),
    "cifar": ("folder", {"path": "cifar10_jpg/test", "split": "test"}, 200, {}),
    "emodb": ("folder", {"path": "emodb_speech", "columns": {"keep": r"\.wav$"}}, 60, {}),
    "fsdd": (
        "folder",
        {
            "path": "fsdd/recordings",
            "columns": {"label": r"(?P<label>\d)_(?P<speaker>[a-z]+)_", "keep": r"_([5-9]|1\d|2[0-3])\.wav$"},
        },
        760,
        {},
    ),
}


def source_of(root: Path, fields: dict) -> SourceFiles:
    values = {key: root / value if key in PATHS else value for key, value in fields.items()}
    return SourceFiles(id="s", split=values.pop("split", "train"), **values)


@pytest.mark.parametrize("name", CASES)
def test_every_file_is_read(name: str, shared_datasets: Path):
    reader, fields, records, rejects = CASES[name]
    found = list(find_reader(reader)(source_of(shared_datasets, fields)))
    kept = [item for item in found if isinstance(item, Record)]
    refused = Counter(item.reason for item in found if isinstance(item, Reject))
    assert dict(refused) == rejects, [item for item in found if isinstance(item, Reject)][:3]
    assert len(kept) == records
    assert len({item.id for item in kept}) == len(kept)
    for record in kept:
        assert bool(record.messages) != bool(record.references) or fields.get("split") == "test"
        assert record.where

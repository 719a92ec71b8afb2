"""Write data/base: the tiny vision-language model's config, tokenizer, processor and chat template.

The model is a LLaVA of the smallest useful size in standard transformers classes: a CLIP vision
tower, a two-layer projector and a Llama language model. This script decides its shape and makes
its tokenizer; the weights are learned by ``mmtune run recipes/base.yaml``. Run from anywhere::

    python data/make_base.py                          # everything but the weights
    python data/make_base.py --out /tmp/x --weights   # with the weights that training starts from

The same bundled scenes give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

HERE = Path(__file__).parent
IMAGE_PX = 48
PATCH_PX = 12
VOCABULARY = 1024
CONTEXT = 4096
POSITION_SCALE = 0.5
PAD, START, END, IMAGE = "<pad>", "<|im_start|>", "<|im_end|>", "<image>"

# Words that open a line (roles and short answers), so that each is one token.
OPENING_WORDS = (
    "system user assistant tool yes no left right middle red green blue yellow white pink black gray "
    "purple brown orange teal circle rectangle triangle one two three a an the Is What Which How Are"
)

# Plain words beyond the scenes' own, so that ordinary questions stay short in tokens.
GENERAL_TEXT = """
system user assistant tool You are a helpful assistant. Answer the question about the picture.
Answer with one word or a short phrase. Describe the image. Write a short caption. Answer:
What is this? What is shown in the image? What shape is in the image? What color is the shape?
Does the image contain a circle, a rectangle or a triangle? Is there a shape? Is there not a shape?
Does the image not contain a black, gray, blue, red, green, yellow, brown or teal shape?
is a shape present? yes no none left right top bottom middle center up down inside outside
How many people are in the photo? Who is the man? Where is the woman? When was it taken? Why?
a man a woman a child people person dog cat horse bird car bus train street road house room table
chair food plate water grass tree sky beach snow field city building window door light dark
standing sitting walking holding wearing playing looking riding near behind in front of next to
with and or but if then than that this these those there here it is was were are be been has have
had do does did will would can could should may might not only also very more most less least some
many few all any each other another one two three four five six seven eight nine ten zero first
second last new old big small large long short high low good bad white orange pink purple
the of to in on at by for from as into over under about after before between through during
I you he she they we him her them us my your his their our what which who whom whose how much
say said make made get take give show tell ask think know see look come go use find want need
number value total percent year day time name title chart bar line legend axis table data text
"""

CHAT_TEMPLATE = """\
{%- macro body(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}
{%- for part in content -%}
{%- if part is string -%}{{ part }}
{%- elif part.type == 'image' -%}{{ '<image>' }}
{%- elif part.text is defined -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>tools\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{{- body(message.content) -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '\\ncall ' + call.name + ' ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def bundled_text() -> Iterator[str]:
    """Questions and captions of the training scenes, then the general words."""
    folder = HERE / "scenes" / "annotations"
    with gzip.open(folder / "base_train_questions.json.gz", "rt", encoding="utf-8") as stream:
        yield from (row["question"] for row in json.load(stream)["questions"])
    captions = json.loads((folder / "captions_train.json").read_text(encoding="utf-8"))
    yield from (row["caption"] for row in captions["annotations"])
    for line in GENERAL_TEXT.strip().splitlines():
        yield from [line] * 50
    for word in OPENING_WORDS.split():
        yield from [word] * 200


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, every digit is its own token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(bundled_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, IMAGE],
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: every picture is squeezed to one small square, whatever its shape."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    images = CLIPImageProcessorPil(size=square, crop_size=square, resample=3, image_mean=[0.2] * 3, image_std=[0.2] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The model's shape."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        dtype="float32",
    )


def write_start(config: LlavaConfig, folder: Path) -> None:
    """Write random weights (seed 0) whose position embeddings are as loud as the patches and say what belongs together.

    CLIP starts positions at 0.02, twenty times below what a patch of these pictures gives, and they stay
    there: the model learns colours and counts but not what is left or right. A position starts as the sum of a
    vector of its quarter of the picture and one of its place within, so that attention finds the patches of one
    digit early.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    side, width = IMAGE_PX // PATCH_PX, config.vision_config.hidden_size
    quarter = torch.randn(2, 2, width).repeat_interleave(side // 2, 0).repeat_interleave(side // 2, 1)
    place = torch.randn(side // 2, side // 2, width).repeat(2, 2, 1)
    grid = POSITION_SCALE * (1.5 * quarter + place)
    with torch.no_grad():
        positions = model.model.vision_tower.embeddings.position_embedding.weight
        positions[0].normal_(0.0, POSITION_SCALE)
        positions[1:] = grid.reshape(side * side, width)
    model.save_pretrained(folder)


def main() -> None:
    """Write the folder given by ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument("--weights", action="store_true", help="also write the weights that training starts from")
    arguments = parser.parse_args()
    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    make_processor(tokenizer).save_pretrained(arguments.out)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(arguments.out)
    if arguments.weights:
        write_start(config, arguments.out)


if __name__ == "__main__":
    main()

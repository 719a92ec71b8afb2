"""The shipped wordings of tasks about media; the first of each is the one of ``templates: first``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmtune.prompts.forms import AnswerKind, Template
from mmtune.records import MODALITIES


def wordings(
    task: str,
    kind: AnswerKind,
    prompts: Mapping[str, str],
    inverted: Mapping[str, tuple[str, str]] | None = None,
    of: Mapping[str, str] | None = None,
) -> tuple[Template, ...]:
    """Returns the templates of a task.

    Args:
        task: Its name.
        kind: What its answers are.
        prompts: Template id to what the user says.
        inverted: Template id to what the user says and what is answered, when the answer is given.
        of: Template id to the kinds of media that it speaks of, a space between them; those not named fit any row.
    """
    said = {name: frozenset(kind for kind in MODALITIES if kind in kinds.split()) for name, kinds in (of or {}).items()}
    plain = [Template(name, prompt, task=task, answer_kind=kind) for name, prompt in prompts.items()]
    turned = [
        Template(name, prompt, answer, task=task, inverted=True) for name, (prompt, answer) in (inverted or {}).items()
    ]
    return tuple(replace(one, speaks_of=said.get(one.id, frozenset())) for one in (*plain, *turned))


_VQA = {
    "vqa_short": "{question}\nAnswer the question using a single word or phrase.",
    "vqa_plain": "{question}",
    "vqa_question": "Question: {question}\nShort answer:",
    "vqa_look": "Look at the picture and answer briefly: {question}",
    "vqa_based": "Based on the image, answer in a few words. {question}",
    "vqa_shown": "Given what is shown, {question}\nGive only the answer.",
    "vqa_see": "Use what you see to answer this question: {question}",
    "vqa_q_a": "Q: {question}\nA:",
    "vqa_media_first": "{media}\nThe question about it is: {question} Reply with one word or phrase.",
    "vqa_brief": "{question} Keep the answer to one or two words.",
    "vqa_listen": "Listen and answer briefly: {question}",
    "vqa_sound": "Based on the sound, answer in a few words. {question}",
    "vqa_heard": "Given what is heard, {question}\nGive only the answer.",
    "vqa_hear": "Use what you hear to answer this question: {question}",
    "vqa_watch": "Watch the video and answer briefly: {question}",
    "vqa_video": "Based on the video, answer in a few words. {question}",
}
_VQA_INVERTED = {
    "vqa_ask": ("Ask a question about what is shown that has the answer: {answer}", "{question}"),
    "vqa_what_question": ('The answer is "{answer}". What was asked about this picture?', "{question}"),
    "vqa_ask_heard": ("Ask a question about what is heard that has the answer: {answer}", "{question}"),
    "vqa_sound_question": ('The answer is "{answer}". What was asked about this sound?', "{question}"),
}
_VQA_OF = {
    **dict.fromkeys(("vqa_look", "vqa_based", "vqa_what_question"), "image"),
    **dict.fromkeys(("vqa_shown", "vqa_see", "vqa_ask"), "image video"),
    **dict.fromkeys(("vqa_listen", "vqa_sound", "vqa_heard", "vqa_hear"), "audio"),
    **dict.fromkeys(("vqa_ask_heard", "vqa_sound_question"), "audio"),
    **dict.fromkeys(("vqa_watch", "vqa_video"), "video"),
}
_CAPTION = {
    "caption_sentence": "Describe the image in one sentence.",
    "caption_short": "Write a short caption for this image.",
    "caption_what": "What does this picture show?",
    "caption_provide": "Provide a one-sentence caption for the image.",
    "caption_say": "Say in a few words what can be seen here.",
    "caption_sum_up": "Sum up the content of the picture briefly.",
    "caption_reader": "Describe this picture to a person who cannot see it, in one sentence.",
    "caption_label": "A caption for this image:",
    "caption_scene": "What is happening in this scene? Answer with one sentence.",
    "caption_below": "{media}\nWrite the line that would stand below this picture.",
}
_CAPTION_HEARD = {
    "caption_sound_sentence": "Describe the sound in one sentence.",
    "caption_sound_short": "Write a short caption for this sound.",
    "caption_sound_what": "What can be heard here?",
    "caption_sound_provide": "Provide a one-sentence caption for the sound.",
    "caption_sound_say": "Say in a few words what this sounds like.",
    "caption_sound_sum_up": "Sum up the content of the recording briefly.",
    "caption_sound_reader": "Describe this sound to a person who cannot hear it, in one sentence.",
    "caption_sound_label": "A caption for this recording:",
    "caption_sound_going_on": "What is going on in this recording? Answer with one sentence.",
    "caption_sound_below": "{media}\nWrite the line that would stand below this recording.",
}
_CAPTION_FILMED = {
    "caption_video_sentence": "Describe the video in one sentence.",
    "caption_video_short": "Write a short caption for this video.",
    "caption_video_what": "What does this video show?",
    "caption_video_provide": "Provide a one-sentence caption for the video.",
    "caption_video_sum_up": "Sum up the content of the clip briefly.",
    "caption_video_reader": "Describe this clip to a person who cannot see it, in one sentence.",
    "caption_video_label": "A caption for this video:",
    "caption_video_below": "{media}\nWrite the line that would stand below this video.",
}
_CAPTION_OF = {
    **dict.fromkeys(_CAPTION, "image"),
    **dict.fromkeys(("caption_say", "caption_scene"), "image video"),
    **dict.fromkeys(_CAPTION_HEARD, "audio"),
    **dict.fromkeys(_CAPTION_FILMED, "video"),
}
_CHART = {
    "chart_short": "{question}\nAnswer the question using a single word, number or phrase.",
    "chart_plain": "{question}",
    "chart_read": "Read the chart and answer: {question}",
    "chart_values": "Use the values of the chart. {question}",
    "chart_question": "Question about the chart: {question}\nAnswer:",
    "chart_figure": "The figure above holds the answer to this: {question}",
    "chart_number": "{question}\nGive the number or word that the chart tells, without a unit.",
    "chart_axes": "Look at axes, legend and marks, then answer: {question}",
    "chart_according": "According to this chart, {question}",
    "chart_media_first": "{media}\nQ: {question}\nA:",
}
_CHART_INVERTED = {"chart_ask": ("Write a question about this chart that is answered by: {answer}", "{question}")}
_COUNT = {
    "count_number": "{question}\nAnswer with a number.",
    "count_plain": "{question}",
    "count_digits": "Count carefully: {question} Reply with digits only.",
}
_PRESENCE = {
    "presence_yes_no": "{question}\nAnswer yes or no.",
    "presence_plain": "{question}",
    "presence_look": "Look at the image. {question} Reply with yes or no.",
}
_LABEL = {
    "label_category": "Which category does this belong to? Answer with its name only.",
    "label_what": "What is this? Answer with one label.",
    "label_classify": "Classify this input. Reply with the label.",
}
_LABEL_OPTIONS = {
    "label_choose": "Choose the label that fits: {options}.",
    "label_which": "Which of these is it: {options}? Answer with its name only.",
    "label_options_classify": "Classify this input as one of: {options}.",
}
_CHOICE = {
    "choice_list": "{question}\nOptions: {options}\nAnswer with one of the options.",
    "choice_among": "{question} Choose among: {options}.",
    "choice_flan": "{question}\n\n{options_}",
}

MEDIA_POOLS: dict[str, tuple[Template, ...]] = {
    "vqa": wordings("vqa", "text", _VQA, _VQA_INVERTED, _VQA_OF),
    "caption": wordings("caption", "text", {**_CAPTION, **_CAPTION_HEARD, **_CAPTION_FILMED}, of=_CAPTION_OF),
    "chart": wordings("chart", "text", _CHART, _CHART_INVERTED),
    "count": wordings("count", "number", _COUNT),
    "presence": wordings("presence", "yes_no", _PRESENCE, of={"presence_look": "image"}),
    "label": wordings("label", "label", _LABEL),
    "label_options": wordings("label", "label", _LABEL_OPTIONS),
    "choice": wordings("", "label", _CHOICE),
}
"""Pool to its wordings; ``label_options`` and ``choice`` are for rows with a short list of options."""

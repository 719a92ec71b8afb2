"""The shipped wordings of tasks about text; the first of each is the one of ``templates: first``.

A template is drawn only for rows that have what its slots name, so that a task may have wordings
with and without options, context or types.
"""

from __future__ import annotations

from mmtune.prompts.forms import Template
from mmtune.prompts.pool_media import wordings

_SENTIMENT = {
    "sentiment_what": "{text}\nWhat is the sentiment of this text?",
    "sentiment_options": "{text}\nIs the sentiment one of these: {options}? Which?",
    "sentiment_flan": "{text}\n\nWhat feeling does this express?\n{options_}",
    "sentiment_text_first": "Text: {text}\nSentiment:",
    "sentiment_writer": "How does the writer of this feel? {text}",
    "sentiment_choose": "Choose the sentiment of the text among {options}.\n\nText: {text}",
    "sentiment_label": "Give the text below its sentiment label.\n\n{text}",
    "sentiment_tone": '"{text}"\nThe tone of this is',
    "sentiment_one_of": "Answer with one of: {options}.\nWhich of them does this text express? {text}",
    "sentiment_opinion": "Read the following and judge the attitude behind it.\n\n{text}",
    "sentiment_question": 'Question: what sentiment does "{text}" carry?\nAnswer:',
    "sentiment_list": "{options_}\n\nPick the one that fits this text: {text}",
}
_SENTIMENT_INVERTED = {
    "sentiment_write": ("Write a short text whose sentiment is {answer}.", "{text}"),
    "sentiment_compose": ("Sentiment: {answer}\nA text with this sentiment:", "{text}"),
}
_ENTITIES = {
    "entities_list": (
        'List the named entities of the text as "type: name", separated by semicolons; '
        'answer "none" if there are none.\n\n{text}'
    ),
    "entities_types": (
        'Find every {types} in the text. Write "type: name" for each, separated by semicolons, '
        'or "none".\n\nText: {text}'
    ),
    "entities_text_first": (
        "{text}\n\nWhich named entities are mentioned? Format: type: name; type: name. Write none if nothing is named."
    ),
    "entities_extract": "Extract the entities (type: name; ...) from: {text}",
    "entities_known": "Entity types: {types}.\nSentence: {text}\nEntities:",
    "entities_names": "Which names does this sentence hold, and of which type is each ({types})? {text}",
    "entities_tag": 'Tag the named entities, one "type: name" after the other with semicolons between them.\n{text}',
    "entities_sentence": "Sentence: {text}\nNamed entities (type: name; none when there are none):",
    "entities_read": "Read the text and write down what is named in it, as type: name.\n\n{text}",
    "entities_question": 'What named entities occur in "{text}"? Answer as type: name; type: name.',
}
_ENTITIES_INVERTED = {"entities_write": ("Write a sentence that names these entities: {answer}", "{text}")}
_ANSWERS = {
    "qa_context_first": "{context}\n\nQuestion: {question}\nAnswer:",
    "qa_passage": (
        "Refer to the passage and answer the question in its own words.\n\nPassage: {context}\n\nQuestion: {question}"
    ),
    "qa_question_first": "{question}\n\nThe answer stands in this text: {context}",
    "qa_according": "According to the text below, {question}\n\n{context}",
    "qa_short": "Text: {context}\n\nAnswer this briefly: {question}",
    "qa_span": "Copy the words of the text that answer the question.\nText: {context}\nQuestion: {question}",
    "qa_read": "Read this and answer.\n\n{context}\n\nQ: {question}\nA:",
    "qa_wonder": "{context}\n\nHaving read that, tell me: {question}",
    "qa_exam": 'EXAM\nText: {context}\nTask: answer "{question}" with as few words as possible.',
    "qa_find": 'Find the answer to "{question}" in the following.\n\n{context}',
    "qa_closed": "{question}\nAnswer with a word or short phrase.",
}
_ANSWERS_INVERTED = {
    "qa_ask": ('{context}\n\nAsk a question about this text that has the answer "{answer}".', "{question}"),
    "qa_generate": ("Text: {context}\nAnswer: {answer}\nQuestion:", "{question}"),
}
_DIALOGUE = {
    "dialogue_continue": "{dialogue}\n\nWhat is said next?",
    "dialogue_reply": "Reply to the last line of this conversation.\n\n{dialogue}",
    "dialogue_next": "Conversation:\n{dialogue}\nNext turn:",
    "dialogue_answer": "Read the dialogue and write the answer that follows.\n\n{dialogue}",
    "dialogue_partner": "You take part in this conversation. Give your next line.\n\n{dialogue}",
    "dialogue_fitting": "What would be a fitting response?\n\n{dialogue}",
    "dialogue_turn": "{dialogue}\n\nWrite the turn that comes after this.",
    "dialogue_respond": "Respond to this:\n{dialogue}",
    "dialogue_finish": "Carry the following dialogue on by one turn.\n\n{dialogue}",
    "dialogue_plain": "{dialogue}",
}
_DIALOGUE_INVERTED = {
    "dialogue_before": ("A conversation ended with this line: {answer}\nWrite what was said before it.", "{dialogue}")
}
_RECOMMENDATION = {
    "recommend_next": "The user liked: {text}\nWhat should be recommended next?",
    "recommend_options": "The user liked: {text}\nWhich of these fits best: {options}?",
    "recommend_history": "History: {text}\nNext item:",
    "recommend_flan": "Somebody chose {text}. What will they choose now?\n\n{options_}",
    "recommend_because": "Because you enjoyed {text}, you may also enjoy",
    "recommend_suggest": "Suggest one item to a person with this history: {text}",
    "recommend_predict": "Predict the next item of this sequence: {text}",
    "recommend_pick": "Pick the item among {options} that a person who liked {text} would take.",
    "recommend_taste": "Taste of the user: {text}\nYour recommendation:",
    "recommend_one": "Name a single item to recommend after {text}.",
}
_RECOMMENDATION_INVERTED = {"recommend_why": ("A user was recommended {answer}. What did they like before?", "{text}")}
_RECOMMENDATION_SHOWN = {
    "recommend_shown_next": "What should be recommended next?",
    "recommend_shown_user": "What will this user choose next?",
    "recommend_shown_predict": "Predict the next item of this history.",
    "recommend_shown_item": "Next item:",
    "recommend_shown_suggest": "Suggest one item to the user with this history.",
    "recommend_shown_enjoy": "{media}\nThe same user may also enjoy",
    "recommend_shown_options": "Which of these fits this user best: {options}?",
    "recommend_shown_pick": "Pick the item among {options} that this user would take.",
    "recommend_shown_flan": "What will this user choose now?\n\n{options_}",
}
_INSTRUCTION = {
    "instruction_plain": "{question}",
    "instruction_task": "Task: {question}",
    "instruction_response": "Instruction: {question}\nResponse:",
    "instruction_follow": "Follow this instruction: {question}",
    "instruction_do": "Do what is asked.\n\n{question}",
    "instruction_input": "{question}\n\nInput: {context}",
    "instruction_context_first": "{context}\n\n{question}",
    "instruction_given": "Given this input:\n{context}\n\n{question}",
    "instruction_output": "Instruction: {question}\nInput: {context}\nOutput:",
    "instruction_please": "Please answer the following.\n\n{question}",
}
_INSTRUCTION_INVERTED = {"instruction_ask": ("Which instruction would lead to this answer?\n\n{answer}", "{question}")}

TEXT_POOLS: dict[str, tuple[Template, ...]] = {
    "sentiment_analysis": wordings("sentiment_analysis", "label", _SENTIMENT, _SENTIMENT_INVERTED),
    "named_entity_recognition": wordings("named_entity_recognition", "entities", _ENTITIES, _ENTITIES_INVERTED),
    "question_answering": wordings("question_answering", "text", _ANSWERS, _ANSWERS_INVERTED),
    "dialogue": wordings("dialogue", "text", _DIALOGUE, _DIALOGUE_INVERTED),
    "recommendation": wordings("recommendation", "label", _RECOMMENDATION, _RECOMMENDATION_INVERTED),
    "recommendation_shown": wordings(
        "recommendation", "label", _RECOMMENDATION_SHOWN, of=dict.fromkeys(_RECOMMENDATION_SHOWN, "behaviour")
    ),
    "instruction": wordings("instruction", "text", _INSTRUCTION, _INSTRUCTION_INVERTED),
    "text": wordings("text", "text", {"text_plain": ""}),
}
"""Task to its wordings; the ``text`` of a corpus has nothing before it. ``recommendation_shown`` is for rows that show
a history and ask nothing of their own."""

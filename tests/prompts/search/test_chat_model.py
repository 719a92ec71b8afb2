"""A chat model as proposer, against a local server that answers, waits, refuses or babbles."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtune.errors import CapabilityError, RecipeError
from mmtune.prompts.search import (
    METHODS,
    Budget,
    Candidate,
    Mistake,
    Problem,
    Scored,
    Scorer,
    Solved,
    Space,
    Trace,
    search,
)
from mmtune.prompts.search.chat_model import ChatModel
from mmtune.prompts.search.llm import ChatProposer
from tests.chat_server import Server

SOLVED = tuple(Solved(str(at), f"question {at}", ("yes", "no")[at % 2]) for at in range(6))
SPACE = Space(Candidate("{prompt}"), slots=frozenset({"prompt", "options"}), longest=80)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def model(server: Server, **settings) -> tuple[ChatModel, list[float]]:
    pauses: list[float] = []
    return ChatModel(server.url, "writer", sleep=pauses.append, **settings), pauses


def test_it_asks_as_openai_does(server: Server):
    server.replies = ["hello"]
    ask, _ = model(server, key="secret", temperature=0.5)
    assert ask("hi") == "hello"
    asked = server.asked[0]
    assert asked["path"] == "/v1/chat/completions" and asked["model"] == "writer" and asked["temperature"] == 0.5
    assert asked["messages"] == [{"role": "user", "content": "hi"}]
    assert server.heads[0]["Authorization"] == "Bearer secret" and "secret" not in repr(ask)


def test_a_busy_server_is_asked_again_with_growing_bounded_pauses(server: Server):
    busy = (429, {"Retry-After": "7"}, {})
    server.replies = [
        busy,
        (503, {}, {}),
        (429, {"Retry-After": "999"}, {}),
        (500, {"Retry-After": "soon"}, {}),
        "at last",
    ]
    ask, pauses = model(server)
    assert ask("hi") == "at last"
    assert pauses == [7.0, 2.0, 30.0, 8.0] and len(server.asked) == 5


def test_a_server_that_stays_busy_ends_it_with_exit_4(server: Server):
    server.replies = [(429, {}, {})]
    ask, pauses = model(server, retries=2)
    with pytest.raises(CapabilityError, match="stayed busy: HTTP 429, 3 tries") as caught:
        ask("hi")
    assert caught.value.exit_code == 4 and "prompt.llm" in caught.value.hint and len(pauses) == 2


def test_a_silent_server_is_waited_for_no_longer_than_the_timeout(server: Server):
    server.replies = [5.0, "then it speaks"]
    ask, pauses = model(server, timeout_seconds=0.2)
    assert ask("hi") == "then it speaks" and len(pauses) == 1


def test_a_server_that_is_not_there_ends_it_at_once(server: Server):
    server.close()
    ask, pauses = model(server)
    with pytest.raises(CapabilityError, match="cannot be reached"):
        ask("hi")
    assert not pauses


@pytest.mark.parametrize("reply", [(401, {}, {"error": "bad key"}), (404, {}, {"error": "no such model"})])
def test_a_refusal_says_why(server: Server, reply: tuple):
    server.replies = [reply]
    with pytest.raises(CapabilityError, match=reply[2]["error"]):
        model(server)[0]("hi")


def test_no_redirect_is_followed(server: Server):
    other = Server()
    other.replies = ["stolen"]
    server.replies = [(302, {"Location": f"{other.url}/chat/completions"}, {})]
    with pytest.raises(CapabilityError, match="refused with HTTP 302"):
        model(server, key="secret")[0]("hi")
    assert not other.heads
    other.close()


@pytest.mark.parametrize("text", [{"choices": []}, {"error": "x"}, [], {"choices": [{"message": {}}]}])
def test_something_else_than_a_completion_is_named(server: Server, text: object):
    server.replies = [(200, {}, text)]
    with pytest.raises(CapabilityError, match="gave no chat completion"):
        model(server)[0]("hi")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "ftp://x/y", ""])
def test_only_http_is_asked(url: str):
    with pytest.raises(RecipeError, match="no http address"):
        ChatModel(url, "m")


def proposer(replies: list[str], trace: Trace | None = None) -> tuple[ChatProposer, list[str]]:
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return replies[(len(asked) - 1) % len(replies)]

    return ChatProposer(SPACE, SOLVED, ask, trace or Trace()), asked


def test_questions_tell_slots_examples_history_and_mistakes():
    made, asked = proposer(["Sure! <PROMPT>\nSay it: {prompt}\n</PROMPT> Good luck", "{prompt} bare"])
    dice = random.Random(0)
    assert [one.instruction for one in made.first(2, dice)] == ["Say it: {prompt}", "{prompt} bare"]
    assert "{prompt}" in asked[0] and "{options}" in asked[0] and "answer: yes" in asked[0] and "80" in asked[0]
    assert asked[0] != asked[1], "other examples each time"
    made.after([Scored(Candidate("worse {prompt}"), 0.25), Scored(Candidate("better {prompt}"), 0.5)], 1, dice)
    assert asked[-1].index("worse {prompt}") < asked[-1].index("better {prompt}") and "score: 50.0" in asked[-1]
    made.mended(SPACE.start, [Mistake(SOLVED[0], "perhaps", 0.0)], 1, dice)
    assert "question 0" in asked[-1] and "right answer: yes" in asked[-1] and "it answered: perhaps" in asked[-1]


def test_a_search_survives_bad_proposals_and_is_replayed_without_a_question(tmp_path: Path):
    replies = ["", "lost the slot", "{prompt} " + "long " * 100, "<PROMPT>{prompt} good</PROMPT>", "{prompt} {"]
    path = tmp_path / "trace.jsonl"
    founds = []
    for _ in range(2):
        trace = Trace(path, {"seed": 1})
        made, asked = proposer(replies, trace)
        problem = Problem(SPACE, made, rows=4, population=3, minibatch=2)
        scorer = Scorer(lambda one, rows: [float("good" in one.instruction)] * len(rows), 4, Budget(60), trace)
        founds.append((search(problem, scorer, METHODS["ape"], "ape"), len(asked)))
        trace.close()
    (first, questions), (second, none) = founds
    assert first == second and questions > 0 and none == 0
    assert first.best.candidate.instruction == "{prompt} good"
    assert set(first.refused) == {"empty", "slot_lost", "too_long", "stray_brace", "duplicate"}

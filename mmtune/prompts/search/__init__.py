"""The search for a better prompt: pure methods that see rewards, a budget and proposals, and no model.

How the pieces meet::

    space = Space(Candidate("{prompt}"), slots=frozenset({"prompt", "question"}))
    problem = Problem(space, proposer, rows=64, seed=0)
    scorer = Scorer(score, 64, Budget(2000), Trace(path, identity))
    found = search(problem, scorer, METHODS["ape"], "ape")     # found.best.candidate, found.best.score

- ``score(candidate, rows) -> rewards`` is given by the caller; one pair of prompt and row is one model call.
  Only ``Scorer`` calls it: ``scorer(candidate)`` for all dev rows, ``scorer(candidate, [3, 5])`` for some. It returns
  ``(R,)`` rewards, asks a pair once, raises ``Exhausted`` when the budget does not reach, keeps the best of the
  prompts that were scored on all rows (``scorer.best``; only these count), and stops at NaN (exit 6). Rows of
  ``problem.feedback`` are numbered behind the dev rows; they cost calls and choose nothing.
- A method is ``Method(search, least)`` in a file of its own with the name ``METHOD``, and one line in ``METHODS``.
  ``search(problem, scorer, admission)`` returns when it is done; ``Exhausted`` may pass through it. ``least(problem)``
  says how many calls beside the start's it needs to begin, ``needs`` names the module of a library that it takes.
  Randomness comes from ``problem.dice(name)`` or from ``problem.seed`` alone.
- Whatever else comes from outside and may differ at another time (a chat model's proposals) goes through
  ``trace.step(kind, key, make)``. Then a search that was killed is the same function called again: the trace replays
  what models said and goes on behind it. A method keeps no state on disk.
- Proposals pass ``admission(candidates)``: once each, in the space, the refused counted by reason.
- What is scored needs ``.key`` and ``.facts()`` alone (``Scorable``): vectors of soft tokens may have a class of their
  own beside ``Candidate``.
- ``problem.settings`` is the section of one method's own settings as a plain frozen value.
"""

from mmtune.prompts.search import ape, bbt, gepa, grpo, mipro, opro, random, rl
from mmtune.prompts.search.budget import Budget, Exhausted
from mmtune.prompts.search.candidate import Candidate, Scorable, candidate_of
from mmtune.prompts.search.problem import Found, Method, Problem, Sizes, search
from mmtune.prompts.search.proposer import Mistake, Proposer, Solved
from mmtune.prompts.search.scorer import Scored, Scorer
from mmtune.prompts.search.space import Admission, Space, slots_of
from mmtune.prompts.search.trace import Trace, read_trace

METHODS: dict[str, Method] = {
    "ape": ape.METHOD,
    "opro": opro.METHOD,
    "mipro": mipro.METHOD,
    "gepa": gepa.METHOD,
    "rl": rl.METHOD,
    "rl_lm": grpo.METHOD,
    "bbt": bbt.METHOD,
    "random": random.METHOD,
}
"""Name to the method."""

__all__ = [
    "METHODS",
    "Admission",
    "Budget",
    "Candidate",
    "Exhausted",
    "Found",
    "Method",
    "Mistake",
    "Problem",
    "Proposer",
    "Scorable",
    "Scored",
    "Scorer",
    "Sizes",
    "Solved",
    "Space",
    "Trace",
    "candidate_of",
    "read_trace",
    "search",
    "slots_of",
]

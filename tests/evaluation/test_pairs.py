"""Who is compared with whom."""

from itertools import product

from mmtune.evaluation.pairs import Answerer, leading_pair, pairs_of


def answerers(models: tuple[str, ...], ways: tuple[tuple[int, str], ...]) -> list[Answerer]:
    return [
        Answerer(
            f"{model}, {shots} {how}" if shots else model,
            model.startswith("tuned"),
            model.endswith("best_prompt"),
            shots,
            how,
        )
        for model, (shots, how) in product(models, ways)
    ]


WAYS = ((0, ""), (2, "random"), (2, "retrieval"), (4, "random"), (4, "retrieval"), (8, "random"))


def test_tuning_is_judged_at_equal_exemplars_and_opens_the_report_at_the_most():
    both = answerers(("base", "tuned"), WAYS)
    pairs = pairs_of(both)
    tuning = [(one, two) for one, two in pairs if one.startswith("base") and two.startswith("tuned")]
    assert tuning == pairs[: len(WAYS)] and all(two == one.replace("base", "tuned") for one, two in tuning)
    assert tuning[0] == leading_pair(both) == ("base, 8 random", "tuned, 8 random")
    of_base = [pair for pair in pairs[len(WAYS) :] if pair[0].startswith("base")]
    assert set(of_base) == {
        *(("base", one.name) for one in both[1 : len(WAYS)]),
        ("base, 2 random", "base, 4 random"),
        ("base, 4 random", "base, 8 random"),
        ("base, 2 retrieval", "base, 4 retrieval"),
        ("base, 2 random", "base, 2 retrieval"),
        ("base, 4 random", "base, 4 retrieval"),
    }
    assert len(pairs) == len(WAYS) + 2 * len(of_base)


def test_of_two_ways_of_as_many_exemplars_the_last_opens():
    both = answerers(("base", "tuned"), WAYS[:5])
    assert leading_pair(both) == ("base, 4 retrieval", "tuned, 4 retrieval")


def test_a_prompt_is_judged_beside_and_instead_of_tuning():
    four = answerers(("base", "best_prompt", "tuned", "tuned_best_prompt"), WAYS[:1])
    assert pairs_of(four) == [
        ("base", "tuned"),
        ("best_prompt", "tuned_best_prompt"),
        ("best_prompt", "tuned"),
        ("base", "best_prompt"),
        ("tuned", "tuned_best_prompt"),
    ]
    assert leading_pair(four) == ("base", "tuned")
    assert leading_pair(four[:2]) == ("base", "best_prompt")
    assert leading_pair(four[:1]) is None
    # Prompted models are asked without exemplars: with them, nothing but tuning is alike in all else.
    shown = [*answerers(("base", "tuned"), WAYS[1:2]), four[1]]
    assert pairs_of(shown) == [("base, 2 random", "tuned, 2 random")]


def test_without_tuning_exemplars_are_judged():
    assert leading_pair(answerers(("base",), WAYS[:2])) == ("base", "base, 2 random")
    assert leading_pair(answerers(("tuned",), WAYS[1:5])) == ("tuned, 4 random", "tuned, 4 retrieval")

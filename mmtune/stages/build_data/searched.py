"""build.prompt: a searched prompt that words every row, and the slots that a search will ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmtune.errors import RecipeError
from mmtune.prompts.searched import SearchedPrompt, moved, read_prompt
from mmtune.recipe import Recipe
from mmtune.records import Modality


def keeps_slots(recipe: Recipe) -> bool:
    """Says whether rows keep their slots beside the worded question: for a searched prompt, or to cut their context."""
    if recipe.tokenize.too_long == "shorten":
        return True
    asked = () if recipe.eval is None else recipe.eval.compare
    return recipe.prompt is not None or recipe.build.prompt is not None or any("prompt" in name for name in asked)


def given_prompt(recipe: Recipe) -> tuple[SearchedPrompt, str] | None:
    """Returns the prompt that the recipe names, and the folder of its media; None where it names none.

    Raises:
        RecipeError: It is the prompt that this run itself searches, or one of soft tokens.
        DataError: The file holds no searched prompt.
    """
    if recipe.build.prompt is None:
        return None
    path = Path(recipe.build.prompt)
    if path.resolve().is_relative_to((recipe.run_dir / "prompt").resolve()):
        raise RecipeError(
            f"build.prompt is {path}, which is searched with the rows that it would word",
            "give this recipe another run_dir; eval.compare: [base, best_prompt] needs no build.prompt",
            "own_prompt",
        )
    found, root = read_prompt(path)
    if found.soft:
        raise RecipeError(
            f"build.prompt is {path}, whose soft tokens are no words that rows could hold",
            "search with another method than bbt; its tokens are the adapter in the folder `soft` beside it",
            "soft_prompt",
        )
    return found, root


def check_prompt(prompt: SearchedPrompt | None, held_out: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses a prompt that shows rows of a held-out cluster.

    Args:
        prompt: The prompt, or None.
        held_out: Held-out cluster to its sources.

    Raises:
        RecipeError: One of its exemplars is of a held-out source.
    """
    for cluster, sources in held_out.items():
        shown = next((one.id for one in prompt.exemplars if one.source in sources), None) if prompt else None
        if shown is not None:
            raise RecipeError(
                f"build.prompt shows {shown}, a row of {cluster}, which the mixture holds out",
                "search the prompt without that source, or hold out another cluster",
                "held_out_exemplar",
            )


def prompt_roots(given: tuple[SearchedPrompt, str] | None) -> list[Mapping[Modality, str]]:
    """Returns where the media of a prompt's exemplars lie, as the roots of one more source."""
    if given is None:
        return []
    prompt, root = given
    kinds = {medium.modality for one in prompt.exemplars for medium in one.media if medium.path}
    return [dict.fromkeys(sorted(kinds), root)] if kinds else []


def placed(given: tuple[SearchedPrompt, str] | None, media_root: str) -> SearchedPrompt | None:
    """Returns the prompt with media below this build's media root."""
    return None if given is None else moved(given[0], given[1], media_root)

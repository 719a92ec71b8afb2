"""The recipe: every setting of a run, checked strictly. Its field docs are also the reference.

Order of precedence: defaults < ``extends`` < recipe < environment (``MMTUNE_A__B``) <
``--set a.b=c``. One file per section; ``text`` loads the YAML, ``schema`` is the whole.
"""

from mmtune.recipe.build import TEMPLATE_DRAWS, Build
from mmtune.recipe.evaluation import Eval
from mmtune.recipe.exemplars import BuildExemplars, Exemplars
from mmtune.recipe.extract import BASE, Extract, Reduction
from mmtune.recipe.finetune import Augment, Features, Finetune, Lora, SoftPrompt
from mmtune.recipe.mixture import Mixture
from mmtune.recipe.pretrain import Pretrain
from mmtune.recipe.prompt import Bbt, Prompt, Rl, Writer
from mmtune.recipe.schema import Model, Recipe
from mmtune.recipe.sources import Source
from mmtune.recipe.tokenize import Tokenize

__all__ = [
    "BASE",
    "TEMPLATE_DRAWS",
    "Augment",
    "Bbt",
    "Build",
    "BuildExemplars",
    "Eval",
    "Exemplars",
    "Extract",
    "Features",
    "Finetune",
    "Lora",
    "Mixture",
    "Model",
    "Pretrain",
    "Prompt",
    "Recipe",
    "Reduction",
    "Rl",
    "SoftPrompt",
    "Source",
    "Tokenize",
    "Writer",
]

"""A multimodal language model made of unimodal parts: encoders, projectors and a causal language model.

``register()`` makes transformers' Auto classes know it; mmtune does so wherever it loads a model or a processor.
"""

from __future__ import annotations


def register() -> None:
    """Makes AutoConfig, AutoModel, AutoModelForImageTextToText and AutoProcessor know the composite model."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from mmtune.models.composite.config import CompositeConfig
    from mmtune.models.composite.model import CompositeForConditionalGeneration, CompositeModel
    from mmtune.models.composite.processor import CompositeProcessor

    AutoConfig.register(CompositeConfig.model_type, CompositeConfig, exist_ok=True)
    AutoModel.register(CompositeConfig, CompositeModel, exist_ok=True)
    AutoModelForImageTextToText.register(CompositeConfig, CompositeForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(CompositeConfig, CompositeProcessor, exist_ok=True)

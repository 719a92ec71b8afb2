"""mmtune: raw multimodal data to an instruction-tuned model and an honest report."""

__version__ = "0.1.0"

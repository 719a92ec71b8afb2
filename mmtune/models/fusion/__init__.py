"""How modalities meet: projectors, attention between streams, gates. Tensors only."""

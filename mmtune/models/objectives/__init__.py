"""What alignment and pretraining minimise: reconstruction, minimax, contrast, masking. Tensors only."""

"""Training: order of the data, the loop, optimizer, checkpoints, guards, launching."""

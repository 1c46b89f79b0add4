"""Floor 2: the subspace archive, the saved protected directions of a checkpoint."""

"""The subspace archive, the saved protected directions of a checkpoint."""

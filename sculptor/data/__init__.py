"""Floor 2: from data files to token sequences to batches."""

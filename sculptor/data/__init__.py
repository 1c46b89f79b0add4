"""From data files to token sequences to batches."""

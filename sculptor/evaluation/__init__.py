"""Floor 3: what a checkpoint can do."""

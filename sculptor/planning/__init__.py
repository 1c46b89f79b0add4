"""Floor 5: what a job takes, before it is run."""

"""What a job takes, before it is run."""

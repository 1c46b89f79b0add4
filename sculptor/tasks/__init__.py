"""Floor 4: whole jobs, each what a command calls."""

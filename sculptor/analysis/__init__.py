"""Floor 3: offline tools over checkpoints and archives."""

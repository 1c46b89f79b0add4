"""Floor 4: results as text, JSON and pictures."""

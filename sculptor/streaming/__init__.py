"""Models larger than memory: one transformer block on the device at a time."""

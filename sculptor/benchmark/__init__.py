"""Floor 7: sequences of tasks, and other people's methods in the same harness."""

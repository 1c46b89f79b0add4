"""Sequences of tasks, and other people's methods in the same harness."""

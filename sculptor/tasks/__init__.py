"""Whole jobs, each what a command calls."""

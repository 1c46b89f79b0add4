"""Offline tools over checkpoints and archives."""

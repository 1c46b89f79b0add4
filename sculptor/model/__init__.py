"""Loaded transformers models: how they are opened, and what a batch costs them."""

"""Saved Hugging Face directories; safetensors only, one tensor in memory at a time."""

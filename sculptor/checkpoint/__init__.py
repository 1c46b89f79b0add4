"""Floor 1: saved Hugging Face directories; safetensors only, one tensor in memory at a time."""

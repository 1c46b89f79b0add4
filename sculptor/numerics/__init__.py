"""Floor 0: tensors in, tensors out; no files, no configuration."""

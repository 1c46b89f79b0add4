"""What may change in a matrix, and how that is decided and goes on; tensors and facts, no files."""

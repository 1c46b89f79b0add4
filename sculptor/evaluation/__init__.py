"""What a checkpoint can do."""

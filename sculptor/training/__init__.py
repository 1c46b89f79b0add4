"""The coordinates a model is trained in, and the loop that trains them."""

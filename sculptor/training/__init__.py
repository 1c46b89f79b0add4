"""Floor 3: the coordinates a model is trained in, and the loop that trains them."""

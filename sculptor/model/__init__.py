"""Floor 2: loaded transformers models: how they are opened, and what a batch costs them."""

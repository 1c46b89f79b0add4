"""Floor 3: a new tensor made of one or two old ones, without an optimizer."""

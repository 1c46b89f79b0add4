"""A new tensor made of one or two old ones, without an optimizer."""

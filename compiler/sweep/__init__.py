"""Which recipe? Many of them, compared by size and accuracy."""

"""Told how? Coverage, sizes and errors, on the terminal and as a page."""

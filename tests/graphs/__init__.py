"""Graphs as strangers bring them, each with the lists of passes tried on it and what must come out: `table.py`."""

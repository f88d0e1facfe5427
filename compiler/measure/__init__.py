"""How far from float? Distances, perplexities, speed."""

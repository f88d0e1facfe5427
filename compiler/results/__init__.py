"""What was found: records alone, which everything may import."""

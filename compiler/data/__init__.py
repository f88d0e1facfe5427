"""Fed with what? Inputs of a graph, and calibration data in all its forms."""

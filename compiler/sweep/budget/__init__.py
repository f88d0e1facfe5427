"""A size is given, and every weight gets the format with which the model changes least within it."""

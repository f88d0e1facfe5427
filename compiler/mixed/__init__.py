"""Which nodes in what? Sensitivity, and the nodes that stay in float."""

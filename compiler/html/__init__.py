"""The parts of the HTML report: markup, nodes, the chart of errors, ranges of activations, decisions."""

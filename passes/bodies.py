"""Bodies of If, Loop and Scan: which node holds a graph, and what lies inside."""

from collections.abc import Iterator

import onnx_ir as ir


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds itself."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def body_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes in bodies, at any depth."""
    return (node for node in model.graph.all_nodes() if node.graph is not model.graph)


class Owners:
    """Where the graphs of a model lie; onnx_ir knows no way back from a body to the node that holds it."""

    def __init__(self, model: ir.Model) -> None:
        self._of = {graph: node for node in model.graph.all_nodes() for graph in bodies(node)}

    def path(self, node: ir.Node) -> Iterator[ir.Node]:
        """The node, the one whose body it lies in, … the one of the main graph."""
        current: ir.Node | None = node
        while current is not None:
            yield current
            graph = current.graph
            current = self._of.get(graph) if isinstance(graph, ir.Graph) else None

    def outermost(self, node: ir.Node) -> ir.Node:
        """The node of the main graph that the node is, or in one of whose bodies it lies."""
        *_, last = self.path(node)
        return last

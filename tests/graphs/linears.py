"""Linears in plain surroundings: what must never break."""

from graphs.table import Graph, case


@case({"pack": 15, "smooth,awq,gptq,pack": 17, "qdq": 25, "dynamic": 25}, coverage=1.0)
def two_layers(make: Graph) -> None:
    x = make.input("b", 32)
    make.output(make.linear(make.one("Relu", make.linear(x, 64, bias=True)), 16, 64))


@case({"pack": 15}, packed={"MatMulInt4": 1}, coverage=1.0)
def one_layer(make: Graph) -> None:
    make.output(make.linear(make.input("b", 32), 16))

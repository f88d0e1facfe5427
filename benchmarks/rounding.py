"""Processor seconds of `smooth`, `awq` and `gptq` on one layer of K channels, beside those of plain GPTQ.

    python benchmarks/rounding.py --channels 1024 2048 --python OTHER/.venv/bin/python

Two weights (K, K / 2) of heavy-tailed numbers behind a norm; 2 K rows of correlated channels, of which some are loud.
`plain` is GPTQ alone: ranges of least error, one factorization, one sweep. Each K runs in a process of its own,
with BLAS on one thread. --python: interpreters to compare, each with an installation of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import onnx_ir as ir

from qcompile.models.tiny.build import Builder
from qcompile.passes.awq import Awq
from qcompile.passes.base import Region
from qcompile.passes.gptq import Gptq
from qcompile.passes.linears import find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.smooth import Smooth
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import limited

SPEC = QuantSpec(4, PerGroup(64))
SAMPLE = 1024


def layer(channels: int) -> Region:
    """The region of one norm and two products, with statistics."""
    rng = np.random.default_rng(channels)
    rows = rng.standard_normal((2 * channels, channels), np.float32)
    rows[:, 1:] += 0.7 * rows[:, :-1] + 0.5 * rows[:, :1]
    rows *= rng.lognormal(0, 1, channels).astype(np.float32)
    b = Builder(opset=21)
    v = b.Mul(b.input("x", ir.DataType.FLOAT, ["n", channels]), b.weight("gamma", np.ones(channels, np.float32)))
    weights = (rng.standard_t(4, (channels, channels // 2)).astype(np.float32) for _ in range(2))
    made = [b.MatMul(v, b.weight(f"w{i}", w), name=f"linear{i}") for i, w in enumerate(weights)]
    region = Region.whole(b.model({f"y{i}": value for i, value in enumerate(made)}))
    sample, rest = np.split(rows, [SAMPLE])
    known = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), sample, np.abs(rest).max(axis=0))
    region.statistics[find_linears(region.model.graph)[0].activation] = known
    return region


def seconds(channels: int) -> dict[str, float]:
    """By what ran, what the processor worked."""
    region, policy = layer(channels), Policy(SPEC, None, None)
    gptq = Gptq(policy)
    linears = find_linears(region.model.graph)
    known, taken = region.statistics[linears[0].activation], {}
    bare = Statistics(known.rows, known.gram, known.absmax)
    weights = np.concatenate([linear.read() for linear in linears], axis=1)
    runs = {
        "plain": lambda: gptq.rounds_by(weights, SPEC, bare),
        "smooth": lambda: Smooth(policy, gptq.rounds_by).call(region),
        "awq": lambda: Awq(policy, gptq.rounds_by).call(region),
        "gptq": lambda: gptq.call(region),
    }
    for name, run in runs.items():
        started = time.process_time()
        run()
        taken[name] = time.process_time() - started
    errors = [float(decision.detail["relative_error"]) for decision in gptq.decisions]
    return taken | {"error": sum(errors) / len(errors)}


def main() -> None:
    """A row for each interpreter and K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to compare")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with limited(1):
            print(json.dumps(seconds(args.one)))
        return
    heads = ("K", "interpreter", "plain", "smooth", "awq", "gptq", "all over plain", "relative error")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    for channels in args.channels:
        for number, python in enumerate(args.python):
            command = [python, __file__, "--one", str(channels)]
            found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            own = json.loads(found.splitlines()[-1])
            whole = (own["smooth"] + own["awq"] + own["gptq"]) / own["plain"]
            cells = [f"{own[name]:.2f}" for name in ("plain", "smooth", "awq", "gptq")]
            print(f"| {channels} | {number} | {' | '.join(cells)} | {whole:.1f} | {own['error']:.4f} |", flush=True)


if __name__ == "__main__":
    main()

"""Transformers' architectures, exported several ways, compiled by several lists: what works, and why the rest does not.

    .venv/bin/python benchmarks/architectures.py FOLDER [--only bert,vit] [--exporters qcompile,dynamo,script,optimum]
    .venv/bin/python benchmarks/architectures.py FOLDER --table

Small random models (architectures_zoo.py); nothing is downloaded. Every figure is a line of FOLDER/results.jsonl, and
what stands there is not done again. `optimum` needs optimum-onnx, which is no dependency of this project and wants an
older transformers: `pip install --target PACKAGES optimum-onnx`, and OPTIMUM_PACKAGES=PACKAGES, for its process alone.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from architectures_zoo import ARCHITECTURES

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.commands.export import open_model
from qcompile.compiler.data.inputs import Input, input_plan
from qcompile.compiler.files.load import load_model
from qcompile.models import hf, kinds, parts, trace
from qcompile.models.export import export_model
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import session

LISTS = ("pack", "smooth,awq,gptq,pack", "smooth,qdq")
# Sizes of dimensions by their names, in calibration and in the comparison.
_SIZES = {"batch": 2, "sequence": 12, "past_sequence": 5, "total_sequence": 17, "encoder_sequence": 11, "samples": 4000}
# The same in optimum's names.
_SIZES |= {f"{name}_{more}": size for name, size in _SIZES.items() for more in ("size", "length")}
_SIZES |= {"past_sequence_length + sequence_length": 17, "past_sequence_length + 1": 17, "decoder_sequence_length": 12}
_SIZES |= {"num_channels": 3, "image_batch_size": 2, "text_batch_size": 2}
_BATCHES = 8
_SHOWN = re.compile("\x1b\\[[0-9;]*m")  # colours of a terminal
Feeds = dict[str, npt.NDArray[Any]]
Exporter = Callable[[Path, Path], list[Path]]


def by_qcompile(source: Path, target: Path) -> list[Path]:
    """`qcompile export`."""
    done = export_model(source, target, open_model=open_model)
    return [target / name for name in done.record["graphs"]]


def by_dynamo(source: Path, target: Path) -> list[Path]:
    """torch.onnx.export(dynamo=True), as it comes."""
    return list(_by_torch(source, target, dynamo=True))


def by_script(source: Path, target: Path) -> list[Path]:
    """torch.onnx.export(dynamo=False), the TorchScript exporter."""
    return list(_by_torch(source, target, dynamo=False))


# optimum asks for a task where the model comes from a folder: the first of these that it knows for the architecture.
_OPTIMUM = """
import json, sys
from optimum.exporters.onnx import main_export
from optimum.exporters.tasks import TasksManager

source, target = sys.argv[1:]
kind = json.load(open(source + "/config.json"))["model_type"]
known = TasksManager.get_supported_tasks_for_model_type(kind.replace("_", "-"), "onnx", library_name="transformers")
wanted = ("text2text-generation-with-past", "automatic-speech-recognition-with-past", "text-generation-with-past",
          "fill-mask", "object-detection", "semantic-segmentation", "zero-shot-image-classification",
          "automatic-speech-recognition", "image-classification", "audio-classification", "feature-extraction")
task = next(name for name in wanted if name in known)
main_export(source, output=target, task=task, do_validation=False, local_files_only=True)
"""


def by_optimum(source: Path, target: Path) -> list[Path]:
    """optimum-onnx, in a process of its own. UserError: the last line of its error."""
    environment = {**os.environ, "PYTHONPATH": os.environ.get("OPTIMUM_PACKAGES", "")}
    command = [sys.executable, "-c", _OPTIMUM, str(source), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip() or "no message").splitlines()[-1])
    return sorted(target.glob("*.onnx"))


EXPORTERS: dict[str, Exporter] = {
    "qcompile": by_qcompile,
    "dynamo": by_dynamo,
    "script": by_script,
    "optimum": by_optimum,
}


def _by_torch(source: Path, target: Path, *, dynamo: bool) -> Iterator[Path]:
    import torch

    checkpoint = hf.open_folder(source, str(source))
    config = hf.load_config(checkpoint)
    kind = kinds.kind_of(config)
    model = hf.load_model(checkpoint, config, kind=kind, dtype="fp32")
    if kind in (kinds.DECODER, kinds.ENCODER):
        signature = trace.signature_of(model, decoder=kind == kinds.DECODER, kv_cache=False)
        given = [torch.ones((2, 7), dtype=torch.int64) for _ in signature.inputs]
        graphs = [("model", trace.wrap(model, signature, decoder=kind == kinds.DECODER), signature, given)]
    else:
        graphs = [
            (part.name, part.module, part.signature, [torch.from_numpy(a) for a in part.feeds(parts.TRACED).values()])
            for part in parts.parts_of(model, kind, source, kv_cache=False, dtype="fp32")
        ]
    for name, module, signature, given in graphs:
        path = target / f"{name}.onnx"
        axes = {value: {i: dim for i, dim in enumerate(dims) if dim} for value, dims in {**signature.inputs}.items()}
        how: dict[str, Any] = {"input_names": list(signature.inputs), "output_names": list(signature.outputs)}
        if dynamo:
            shapes = [dict.fromkeys(named, torch.export.Dim.DYNAMIC) for named in axes.values()]
            how |= {"dynamo": True, "dynamic_shapes": (shapes,) if signature.listed_all else tuple(shapes)}
        else:
            how |= {"dynamo": False, "dynamic_axes": axes, "opset_version": 17}
        with torch.no_grad(), hf.quiet():
            torch.onnx.export(module, (given,) if signature.listed_all else tuple(given), str(path), **how)
        yield path


def picture_size(source: Path) -> int:
    """Pixels a side of what a model of this folder looks at; 64 where it does not say."""
    config = json.loads((source / "config.json").read_text())
    return int(config.get("vision_config", config).get("image_size") or 64)


def feeds_of(inputs: tuple[Input, ...], vocabulary: int | None, seed: int, *, picture: int) -> Feeds:
    """Random inputs of a graph: ids, masks of ones, numbers; pictures of that many pixels a side."""
    random, made = np.random.default_rng(seed), {}
    sizes = _SIZES | {"height": picture, "width": picture}
    for given in inputs:
        sound = given.name == "input_values"
        own = ("batch", *("samples" if sound else "sequence",) * len(given.shape))
        named = {} if sound else sizes
        shape = [d if isinstance(d, int) else named.get(str(d), sizes[own[i]]) for i, d in enumerate(given.shape)]
        if given.is_float:
            array = random.standard_normal(shape)
        elif "mask" in given.name:
            array = np.ones(shape)
        elif "position" in given.name:
            array = np.broadcast_to(np.arange(shape[-1]), shape)
        else:
            array = random.integers(3, vocabulary or 256, shape) if "input_ids" in given.name else np.zeros(shape)
        made[given.name] = np.asarray(array).astype(given.dtype)
    return made


def sqnr(wanted: list[Any], found: list[Any]) -> float:
    """The worst of the float outputs, in dB."""
    worst = np.inf
    for a, b in zip(wanted, found, strict=True):
        if a.dtype.kind == "f" and a.size:
            noise, signal = np.sum((a.astype("d") - b) ** 2), np.sum(a.astype("d") ** 2)
            worst = min(worst, float(10 * np.log10(signal / noise)) if noise else np.inf)
    return float(worst)


def compiled(graph: Path, passes: str, picture: int) -> dict[str, Any]:
    """The row of one graph and one list."""
    plan = input_plan(load_model(graph))
    output = graph.parent / "compiled" / graph.name
    batches = [feeds_of(plan.inputs, plan.vocabulary, seed, picture=picture) for seed in range(_BATCHES)]
    started = time.monotonic()
    recipe = Recipe(passes=parse_passes(passes), group_size=32)
    report = compile_model(graph, recipe, output=output, calibration=batches)
    unseen = feeds_of(plan.inputs, plan.vocabulary, 1000, picture=picture)
    runs = [session(path, kernels="portable").run(None, unseen) for path in (graph, output)]
    return {"sqnr": sqnr(*runs), "coverage": report.coverage, "seconds": time.monotonic() - started}


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or why it failed: `refused` with a reason, `crash` with an exception."""
    try:
        return function()
    except UserError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"crash": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


class Results:
    """Rows in a file of lines, by (architecture, exporter, graph, list)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.is_file() else ():
            row = json.loads(line)
            self.rows[tuple(row.pop("key"))] = row

    def get(self, key: tuple[str, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.rows:
            self.rows[key] = attempt(make)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **self.rows[key]}) + "\n")
            print(*key, self.rows[key], flush=True)
        return self.rows[key]


def run(folder: Path, names: list[str], exporters: list[str]) -> None:
    results = Results(folder / "results.jsonl")
    for name in names:
        source = folder / "source" / name
        if not (source / "config.json").is_file():
            with hf.quiet():
                ARCHITECTURES[name].make().save_pretrained(source)
        for exporter in exporters:
            target = folder / exporter / name
            target.mkdir(parents=True, exist_ok=True)
            how = EXPORTERS[exporter]
            done = results.get((name, exporter, "", "export"), lambda: _exported(how, source, target))  # noqa: B023
            picture = picture_size(source)
            for graph, passes in itertools.product(done.get("graphs", ()), LISTS):
                results.get((name, exporter, graph, passes), lambda: compiled(target / graph, passes, picture))  # noqa: B023


def _exported(how: Exporter, source: Path, target: Path) -> dict[str, Any]:
    started = time.monotonic()
    return {"graphs": [path.name for path in how(source, target)], "seconds": time.monotonic() - started}


def table(folder: Path) -> None:
    """A Markdown table, and every reason below it."""
    results = Results(folder / "results.jsonl").rows
    print("| architecture | exporter | graph | " + " | ".join(LISTS) + " |\n|---|---|---|" + "---|" * len(LISTS))
    reasons: dict[str, list[str]] = {}

    def cell(key: tuple[str, ...]) -> str:
        row = results.get(key, {})
        for kind in ("refused", "crash"):
            if kind in row:
                reason = _SHOWN.sub("", row[kind])
                reason = reason if len(reason) < 320 else f"{reason[:300]} …"
                reasons.setdefault(reason, []).append(" ".join(filter(None, key)))
                word = kind if key[3] != "export" or key[1] == "qcompile" else "not exported"
                return f"{word} [{list(reasons).index(reason) + 1}]"
        return f"{row['sqnr']:.1f} dB, {row['coverage']:.0%}" if "sqnr" in row else ""

    for name, exporter, _, what in sorted(results):
        if what != "export":
            continue
        graphs = results[name, exporter, "", "export"].get("graphs")
        if graphs is None:
            print(f"| {name} | {exporter} | {cell((name, exporter, '', 'export'))} |" + " |" * len(LISTS))
        for graph in graphs or ():
            cells = " | ".join(cell((name, exporter, graph, passes)) for passes in LISTS)
            print(f"| {name} | {exporter} | {graph} | {cells} |")
    for number, (reason, keys) in enumerate(reasons.items(), start=1):
        print(f"\n[{number}] {reason} ({'; '.join(keys[:4])})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(ARCHITECTURES), metavar="NAME,…")
    parser.add_argument("--exporters", default="qcompile,dynamo,script", metavar="NAME,…")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        table(args.folder)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    run(args.folder, args.only.split(","), args.exporters.split(","))
    return 0


if __name__ == "__main__":
    sys.exit(main())

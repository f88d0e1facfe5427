"""Int4 models of a float decoder made by other tools, on equal terms with qcompile.

    python benchmarks/peers.py MODEL.onnx -o OUTDIR [--settings g64-asym,...] [--peers ort,hqq,nncf]
    python benchmarks/peers.py MODEL.onnx -o OUTDIR --score --text FILE... [--also COMPILED.onnx ...]

Every peer starts from the same float model and, if it calibrates, from the same windows of the same text. The embedding
and lm_head stay in float, so that only the layers' linears count. A peer runs in a process of its own: its time and
peak memory are its own, and one that fails is recorded while the others go on. Each result lies in
OUTDIR/<peer>-<setting>/ as model.onnx and record.json.

This script imports nothing of qcompile: it runs where the peers are installed (benchmarks/requirements-peers.txt), and
scores with `qcompile eval` of whatever Python is named by --python.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

CALIBRATION_TEXT = Path(__file__).resolve().parents[1] / "models" / "data" / "calibration.txt"
SETTINGS = "g64-asym,g64-sym,g128-asym,g128-sym"
FOUR_BIT = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
# A graph output is reached from lm_head through nothing but these.
PASS_THROUGH = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Add")


@dataclass(frozen=True)
class Setting:
    """Block size and symmetry of a 4-bit weight."""

    group_size: int
    symmetric: bool

    @classmethod
    def parse(cls, text: str) -> Setting:
        """`g64-asym` and the like."""
        match = re.fullmatch(r"g(\d+)-(a?)sym", text)
        if match is None:
            raise ValueError(f"setting {text!r}: expected gN-asym or gN-sym, as in g64-asym")
        return cls(int(match[1]), match[2] == "")

    def __str__(self) -> str:
        return f"g{self.group_size}-{'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class Job:
    """What one peer is asked to do."""

    model: Path
    output: Path
    setting: Setting
    calibration: Path
    tokenizer: Path
    windows: int
    context: int


@dataclass
class Result:
    """What a peer made and how it was asked to."""

    model: onnx.ModelProto
    seconds: float
    versions: dict[str, str]
    settings: dict[str, object]


class NotApplicable(Exception):
    """The peer has no such setting; the message says why."""


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = [Setting.parse(text) for text in args.settings.split(",")]
    peers = args.peers.split(",")
    if unknown := set(peers) - set(PEERS):
        raise SystemExit(f"unknown peers {sorted(unknown)}: choose from {sorted(PEERS)}")
    if args.worker:
        return work(job_of(args, peers[0], settings[0]), peers[0])
    if args.score:
        return score(args)
    for setting in settings:
        for peer in peers:
            run_apart(args, peer, setting)
    print(build_table(args.output))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="float ONNX decoder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--settings", default=SETTINGS, help="gN-asym or gN-sym, separated by commas")
    parser.add_argument("--peers", default="ort,hqq,nncf", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION_TEXT, help="text file")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json (default: beside the model)")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window, calibration and scoring alike")
    parser.add_argument("--score", action="store_true", help="score what lies in the folder with qcompile eval")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="with --score: evaluation texts")
    parser.add_argument("--tokens", type=int, default=4096, help="with --score: tokens taken of each text")
    parser.add_argument("--also", type=Path, nargs="+", default=[], help="with --score: further models to compare")
    parser.add_argument("--python", default=sys.executable, help="with --score: the Python that has qcompile")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tokenizer = args.tokenizer or args.model.parent
    return args


# --- one peer in one process ------------------------------------------------------------------------------------------


def job_of(args: argparse.Namespace, peer: str, setting: Setting) -> Job:
    output = args.output / f"{peer}-{setting}"
    return Job(args.model, output, setting, args.calibration, args.tokenizer, args.windows, args.context)


def run_apart(args: argparse.Namespace, peer: str, setting: Setting) -> None:
    """Runs this script once more for one peer and one setting, and leaves its record also where it fails."""
    job = job_of(args, peer, setting)
    job.output.mkdir(parents=True, exist_ok=True)
    record_path = job.output / "record.json"
    record_path.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(args.model), "-o", str(args.output), "--worker"]
    command += ["--peers", peer, "--settings", str(setting), "--calibration", str(args.calibration)]
    command += ["--tokenizer", str(args.tokenizer), "--windows", str(args.windows), "--context", str(args.context)]
    with open(job.output / "log.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if not record_path.exists():
        lines = (job.output / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        reason = f"exit code {code}: {lines[-1] if lines else 'no output'}"
        write_json(record_path, {"peer": peer, "setting": str(setting), "status": "failed", "reason": reason})
    print(summary_line(json.loads(record_path.read_text(encoding="utf-8"))), flush=True)


def work(job: Job, peer: str) -> int:
    """Quantizes, saves and records. An exception ends the process; the parent records it."""
    record: dict[str, object] = {"peer": peer, "setting": str(job.setting)}
    try:
        result = PEERS[peer](job)
    except NotApplicable as reason:
        write_json(job.output / "record.json", record | {"status": "not applicable", "reason": str(reason)})
        return 0
    path = job.output / "model.onnx"
    (job.output / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(result.model, path, save_as_external_data=True, location="model.onnx.data", convert_attribute=False)
    record |= {
        "status": "ok",
        "versions": result.versions | {"onnx": onnx.__version__},
        "settings": result.settings,
        "seconds": round(result.seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "file_mb": round(sum(f.stat().st_size for f in job.output.glob("model.onnx*")) / 1e6, 1),
        **coverage(onnx.load(path)),
    }
    write_json(job.output / "record.json", record)
    return 0


# --- the peers --------------------------------------------------------------------------------------------------------


def ort_default(job: Job) -> Result:
    """onnxruntime's MatMulNBitsQuantizer as it comes: round to nearest, no data."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig

    config = DefaultWeightOnlyQuantConfig(block_size=job.setting.group_size, is_symmetric=job.setting.symmetric)
    options = {"block_size": job.setting.group_size, "is_symmetric": job.setting.symmetric}
    return ort_quantize(job, config, {"algo_config": "DefaultWeightOnlyQuantConfig", **options})


def ort_hqq(job: Job) -> Result:
    """onnxruntime's HQQ: no data. Its zero points are floats (rounded to integers only before they are optimized)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig

    if job.setting.symmetric:
        raise NotApplicable("HQQ optimizes the zero point: it is asymmetric only")
    config = HQQWeightOnlyQuantConfig(block_size=job.setting.group_size, bits=4)
    options = {"block_size": job.setting.group_size, "bits": 4}
    return ort_quantize(job, config, {"algo_config": "HQQWeightOnlyQuantConfig", **options})


def ort_quantize(job: Job, config: object, settings: dict[str, object]) -> Result:
    import onnxruntime
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    started = time.perf_counter()
    model = onnx.load(job.model)
    excluded = [node.name for node in lm_heads(model.graph)]
    quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=excluded, algo_config=config)
    quantizer.process()
    seconds = time.perf_counter() - started
    versions = {"onnxruntime": onnxruntime.__version__}
    return Result(quantizer.model.model, seconds, versions, settings | {"nodes_to_exclude": excluded})


def nncf_compress(job: Job) -> Result:
    """NNCF's compress_weights with awq and scale estimation on the calibration windows.

    Where K is no multiple of the group size NNCF refuses by default. GroupSizeFallbackMode.ADJUST gives such a weight
    the largest power of two that divides K instead (smaller groups, so more bits: to NNCF's advantage).
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

    started = time.perf_counter()
    model = onnx.load(job.model)
    ignored = [node.name for node in lm_heads(model.graph) + embeddings(model.graph)]
    mode = nncf.CompressWeightsMode.INT4_SYM if job.setting.symmetric else nncf.CompressWeightsMode.INT4_ASYM
    feeds = list(calibration_feeds(job, [value.name for value in model.graph.input]))
    compressed = nncf.compress_weights(
        model,
        mode=mode,
        ratio=1.0,
        group_size=job.setting.group_size,
        # all_layers: otherwise the last MatMul that is not ignored would be left out too.
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(names=ignored),
        dataset=nncf.Dataset(feeds),
        subset_size=job.windows,
        awq=True,
        scale_estimation=True,
        backup_mode=nncf.BackupMode.NONE,
        advanced_parameters=AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST),
    )
    seconds = time.perf_counter() - started
    settings = {
        "mode": mode.name,
        "group_size": job.setting.group_size,
        "ratio": 1.0,
        "awq": True,
        "scale_estimation": True,
        "all_layers": True,
        "backup_mode": "NONE",
        "group_size_fallback_mode": "ADJUST",
        "ignored_scope": ignored,
        "dataset": f"{job.windows} windows of {job.context} tokens",
        "subset_size": job.windows,
    }
    return Result(compressed, seconds, {"nncf": version("nncf"), "onnxruntime": version("onnxruntime")}, settings)


PEERS: dict[str, Callable[[Job], Result]] = {"ort": ort_default, "hqq": ort_hqq, "nncf": nncf_compress}


def calibration_feeds(job: Job, inputs: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Windows spread evenly over the text, without special tokens; tensors are (1, context)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.tokenizer / "tokenizer.json"))
    text = job.calibration.read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    if len(tokens) < job.context:
        raise ValueError(f"{job.calibration} has {len(tokens)} tokens, fewer than one window of {job.context}")
    for start in np.linspace(0, len(tokens) - job.context, job.windows).astype(int):
        ids = tokens[None, start : start + job.context]
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(job.context)[None]}
        yield {name: known[name] for name in inputs}


# --- reading graphs ---------------------------------------------------------------------------------------------------


def lm_heads(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The MatMuls that end in a graph output with nothing but PASS_THROUGH operators between."""
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for output in graph.output:
        node = producers.get(output.name)
        while node is not None and node.op_type in PASS_THROUGH:
            node = producers.get(node.input[0])
        if node is not None and node.op_type in ("MatMul", "Gemm"):
            found.append(node)
    return found


def embeddings(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The Gathers from a constant matrix by a graph input."""
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    inputs = {value.name for value in graph.input}
    return [n for n in graph.node if n.op_type == "Gather" and n.input[0] in weights and n.input[1] in inputs]


def coverage(model: onnx.ModelProto) -> dict[str, object]:
    """Counts the 4-bit linears by block size, the linears left in float, and the bits a quantized weight takes.

    A quantized linear is a 4-bit MatMulNBits, or a MatMul on a DequantizeLinear of a 4-bit tensor.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    blocks: Counter[int] = Counter()
    left, bits, weights = [], 0, 0
    for node in graph.node:
        if node.op_type == "MatMulNBits" and attribute(node, "bits", 4) == 4:
            parts, elements = node.input[1:], attribute(node, "K") * attribute(node, "N")
            block = attribute(node, "block_size")
        elif node.op_type in ("MatMul", "Gemm"):
            source = producers.get(node.input[1])
            stored = constants.get(source.input[0] if source is not None else node.input[1])
            if stored is None:
                continue  # a product of two activations
            if source is None or source.op_type != "DequantizeLinear" or stored.data_type not in FOUR_BIT:
                left.append(node.name)
                continue
            parts, elements, block = source.input, int(np.prod(stored.dims)), attribute(source, "block_size", 0)
        else:
            continue
        blocks[block] += 1
        weights += elements
        bits += sum(stored_bits(constants[name]) for name in parts if name)
    return {
        "linears_4bit": sum(blocks.values()),
        "block_sizes": {str(block): count for block, count in sorted(blocks.items())},
        "linears_left": left,
        "bits_per_weight": round(bits / weights, 3) if weights else None,
    }


def attribute(node: onnx.NodeProto, name: str, default: int | None = None) -> int:
    for item in node.attribute:
        if item.name == name:
            return item.i
    if default is None:
        raise ValueError(f"{node.op_type} {node.name!r} has no attribute {name}")
    return default


def stored_bits(tensor: onnx.TensorProto) -> int:
    width = 4 if tensor.data_type in FOUR_BIT else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(tensor.dims)) * width


# --- records and scores -----------------------------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/record.json"))]


def summary_line(record: dict) -> str:
    name = f"{record['peer']}-{record['setting']}"
    if record["status"] != "ok":
        return f"{name}: {record['status']}: {record['reason']}"
    return (
        f"{name}: {record['linears_4bit']} linears, blocks {record['block_sizes']}, {record['bits_per_weight']} bits, "
        f"{record['file_mb']} MB, {record['seconds']} s, peak {record['peak_mb']} MB"
    )


def build_table(folder: Path) -> str:
    """A Markdown table of what the peers made."""
    lines = [
        "| peer | setting | 4-bit linears (block size: count) | bits per weight | file MB | seconds | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records(folder):
        if record["status"] != "ok":
            lines.append(f"| {record['peer']} | {record['setting']} | {record['status']}: {record['reason']} | | | | |")
            continue
        blocks = ", ".join(f"{block}: {count}" for block, count in record["block_sizes"].items())
        cells = [record["peer"], record["setting"], f"{record['linears_4bit']} ({blocks})"]
        cells += [str(record[key]) for key in ("bits_per_weight", "file_mb", "seconds", "peak_mb")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def score(args: argparse.Namespace) -> int:
    """`qcompile eval` of every model in the folder (and --also) against the float one; writes OUTDIR/scores.json."""
    if not args.text:
        raise SystemExit("--score needs --text FILE...")
    done = [record for record in records(args.output) if record["status"] == "ok"]
    made = [args.output / f"{record['peer']}-{record['setting']}" / "model.onnx" for record in done]
    scores = args.output / "scores.json"
    command = [args.python, "-m", "qcompile.compiler.cli", "eval", "--kernels", "portable"]
    command += map(str, [*made, *args.also])
    command += ["--against", str(args.model), "--text", *map(str, args.text), "--tokenizer", str(args.tokenizer)]
    command += ["--context", str(args.context), "--tokens", str(args.tokens), "--json", str(scores)]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        print(score_table(json.loads(scores.read_text(encoding="utf-8"))))
    return code


def score_table(rows: list[dict]) -> str:
    """A Markdown table of `qcompile eval --json`: a line a model, a group of columns a text, the mean KL last."""
    rows = [row for row in rows if row["text"] != "all texts"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    names = [Path(text).stem for text in texts]
    columns = [f"{name}: {what}" for name in names for what in ("KL", "perplexity", "top-1")]
    lines = ["| model | " + " | ".join(columns) + " | mean KL | mean top-1 |", "|---" * (len(columns) + 3) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        if any(row["kl"] is None for row in of_model):
            continue  # the reference itself
        cells = [Path(model).parent.name]
        for row in of_model:
            cells += [f"{row['kl']:.4f} ± {row['kl_error']:.4f}", f"{row['perplexity']:.2f}", f"{row['agreement']:.2%}"]
        cells.append(f"{np.mean([row['kl'] for row in of_model]):.4f}")
        cells.append(f"{np.mean([row['agreement'] for row in of_model]):.2%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

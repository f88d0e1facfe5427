"""onnxruntime.quantization's int8 models, for int8.py: each made in a process of its own, with its time and memory.

How the model is fed, the same for all: weights inside one file (`quant_pre_process` refuses some models with external
data), at opset 17 if it is below 13 (DequantizeLinear has no axis there, and per-channel models would be invalid),
preprocessed as onnxruntime's documentation advises (shape inference, constant folding, basic fusions).
Batches go through the histogram calibrators one at a time (CalibStridedMinMax = 1, which they obey too): otherwise they
keep every activation of every batch, 80 GB for SmolLM2-135M. Peers of one calibration share its ranges
(calibration_cache_path): the seconds of the first of them contain it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
from int8_data import Feeds, calibration, model_kind
from int8_metrics import file_megabytes

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Quantized inputs and weights, float outputs: nothing is lost behind a product.
INPUTS_ONLY = {"OpTypesToExcludeOutputQuantization": list(LINEAR)}


@dataclass(frozen=True)
class Peer:
    """A way to call onnxruntime's quantizer; what is not said is left at its default.

    method: a CalibrationMethod, or "" for quantize_dynamic. linear: only the LINEAR operators, and of the MatMuls only
    those with a constant weight; gather: embeddings too. activation: a QuantType. options: extra_options.
    raw: not preprocessed.
    """

    method: str = ""
    per_channel: bool = False
    linear: bool = False
    gather: bool = False
    activation: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False

    @property
    def ranges(self) -> str:
        """The file that peers of the same calibration share; "" for none."""
        shared = self.method and "SmoothQuant" not in self.options
        parts = (self.method, "linear" * self.linear, "gather" * self.gather, "raw" * self.raw)
        return f"ranges-{'-'.join(filter(None, parts))}.json" if shared else ""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of quantize_static or quantize_dynamic, without the data."""
        from onnxruntime.quantization import CalibrationMethod, QuantType

        given: dict[str, Any] = {"per_channel": self.per_channel, "extra_options": dict(self.options)}
        if self.method:
            given["calibrate_method"] = CalibrationMethod[self.method]
        if self.activation:
            given["activation_type"] = QuantType[self.activation]
        if self.linear:
            given["op_types_to_quantize"] = [*LINEAR, *["Gather"] * self.gather]
            given["extra_options"]["MatMulConstBOnly"] = True
        return given


PEERS: dict[str, Peer] = {
    "dynamic": Peer(),
    "dynamic-pc": Peer(per_channel=True),
    "dynamic-raw": Peer(raw=True),
    "dynamic-raw-pc": Peer(raw=True, per_channel=True),
    "minmax": Peer("MinMax"),
    "minmax-pc": Peer("MinMax", per_channel=True),
    "percentile": Peer("Percentile"),
    "percentile-pc": Peer("Percentile", per_channel=True),
    "entropy": Peer("Entropy"),
    "entropy-pc": Peer("Entropy", per_channel=True),
    "minmax-smooth": Peer("MinMax", options={"SmoothQuant": True}),
    # Beyond the defaults: what helps most in practice.
    "minmax-linear-pc": Peer("MinMax", per_channel=True, linear=True),
    "percentile-linear-pc": Peer("Percentile", per_channel=True, linear=True),
    "minmax-linear-gather-pc": Peer("MinMax", per_channel=True, linear=True, gather=True),
    "minmax-inputs-pc": Peer("MinMax", per_channel=True, linear=True, options=INPUTS_ONLY),
    "percentile-inputs-pc": Peer("Percentile", per_channel=True, linear=True, options=INPUTS_ONLY),
    "minmax-inputs-pc-u8": Peer("MinMax", per_channel=True, linear=True, activation="QUInt8", options=INPUTS_ONLY),
    "percentile-inputs-pc-u8": Peer(
        "Percentile", per_channel=True, linear=True, activation="QUInt8", options=INPUTS_ONLY
    ),
    "minmax-smooth-inputs-pc": Peer(
        "MinMax", per_channel=True, linear=True, options={**INPUTS_ONLY, "SmoothQuant": True}
    ),
    "minmax-linear-pc-u8": Peer("MinMax", per_channel=True, linear=True, activation="QUInt8"),
    "percentile-linear-pc-u8": Peer("Percentile", per_channel=True, linear=True, activation="QUInt8"),
}


class Reader:
    """A CalibrationDataReader of batches in memory; set_range is what CalibStridedMinMax asks for."""

    def __init__(self, batches: list[Feeds]) -> None:
        self.batches = batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.batches[start_index:end_index])

    def get_next(self) -> Feeds | None:
        return next(self.left, None)

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Feeds:
        return next(self.left)


# --- one peer in one process ------------------------------------------------------------------------------------------


def run_apart(command: list[str], peer: str, folder: Path, *, retry: bool) -> None:
    """Run the worker's command, unless its record is there; leave a record also where it fails."""
    record = folder / "record.json"
    if record.exists() and not (retry and json.loads(record.read_text(encoding="utf-8"))["status"] != "ok"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    started = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if not record.exists():
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = "killed, out of memory?" if code == -9 else lines[-1][:300] if lines else "no output"
        reason = f"exit code {code}: {why}"
        seconds = round(time.perf_counter() - started, 1)
        write_record(folder, {"peer": peer, "status": "failed", "reason": reason, "seconds": seconds})
    print(told(json.loads(record.read_text(encoding="utf-8"))), flush=True)


def work(name: str, model: Path, folder: Path, windows: int, threads: int) -> None:
    """Make one peer's model and its record. An exception ends the process; the parent records it."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic, quantize_static

    peer, kind = PEERS[name], model_kind(model)
    limit_threads(threads)
    folder, source = folder.resolve(), model.resolve()
    target = folder / "model.onnx"
    given = peer.arguments()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the preprocessing leaves files in the current folder
        started = time.perf_counter()
        ready, preprocessing = prepared(source, Path(scratch), raw=peer.raw)
        prepare_seconds = time.perf_counter() - started
        batches = calibration(kind, source, windows) if peer.method else []
        if peer.method not in ("", "MinMax"):
            given["extra_options"]["CalibStridedMinMax"] = 1
        if peer.ranges:
            given["calibration_cache_path"] = folder.parent / peer.ranges
        reused = bool(peer.ranges) and given["calibration_cache_path"].exists()
        started = time.perf_counter()
        if peer.method:
            # A string: SmoothQuant does not know paths.
            quantize_static(str(ready), target, Reader(batches), **given)
        else:
            quantize_dynamic(str(ready), target, **given)
        seconds = time.perf_counter() - started
    write_record(folder, {
        "peer": name, "status": "ok", "seconds": round(seconds, 1), "prepare_seconds": round(prepare_seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "file_mb": round(file_megabytes(target), 1), "threads": threads, "preprocessing": preprocessing,
        "calibration": f"as in {peer.ranges}" if reused else f"{len(batches)} batches",
        "arguments": {key: str(value) for key, value in given.items()},
        "versions": {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
    })  # fmt: skip


def prepared(model: Path, scratch: Path, *, raw: bool) -> tuple[Path, str]:
    """(the model in one file that suits the quantizer, how): symbolic shape inference is left out where it fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    single, ready = scratch / "single.onnx", scratch / "ready.onnx"
    loaded = onnx.load(model)
    old = next(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")) < 13
    onnx.save(onnx.version_converter.convert_version(loaded, 17) if old else loaded, single)
    before = "opset 17, " if old else ""
    if raw:
        return single, before + "not preprocessed"
    for options in ({}, {"skip_symbolic_shape": True}):
        try:
            quant_pre_process(single, ready, **options)
            return ready, before + "quant_pre_process(" + ", ".join(f"{k}={v}" for k, v in options.items()) + ")"
        except Exception as error:  # it raises bare Exception
            print(f"quant_pre_process({options}): {error}", flush=True)
    return single, before + "quant_pre_process failed"


def limit_threads(threads: int) -> None:
    """Have the sessions that the quantizer opens take so many threads: it has no setting for that."""
    import onnxruntime

    plain = onnxruntime.SessionOptions

    def options() -> Any:
        made = plain()
        made.intra_op_num_threads = threads
        return made

    onnxruntime.SessionOptions = options


# --- records ----------------------------------------------------------------------------------------------------------


def write_record(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "record.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def records(folder: Path) -> list[dict[str, Any]]:
    """What is recorded in the folder, in the order of PEERS."""
    paths = [folder / peer / "record.json" for peer in PEERS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def made_models(folder: Path) -> list[Path]:
    """The models that peers made in the folder."""
    return [folder / record["peer"] / "model.onnx" for record in records(folder) if record["status"] == "ok"]


def told(record: Mapping[str, Any]) -> str:
    """One line about a record."""
    if record["status"] != "ok":
        return f"{record['peer']}: {record['status']} after {record['seconds']} s: {record['reason']}"
    return f"{record['peer']}: {record['file_mb']} MB, {record['seconds']} s, peak {record['peak_mb']} MB"


def peer_table(folder: Path) -> str:
    """A Markdown table of what the peers made."""
    lines = ["| peer | file MB | seconds | peak MB | preprocessing |", "|---|---|---|---|---|"]
    for record in records(folder):
        cells = [str(record.get(key, "")) for key in ("file_mb", "seconds", "peak_mb", "preprocessing")]
        if record["status"] != "ok":
            cells = ["", str(record["seconds"]), "", f"failed: {record['reason']}"]
        lines.append(f"| {record['peer']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

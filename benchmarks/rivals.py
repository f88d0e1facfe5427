"""Decoders side by side: qcompile's files in its runtime and in onnxruntime-genai, genai's own, llama.cpp, OpenVINO.

    python benchmarks/rivals.py make  HF_FOLDER -o OUT --python .venv/bin/python
    python benchmarks/rivals.py score HF_FOLDER -o OUT --python .venv/bin/python
    python benchmarks/rivals.py time  HF_FOLDER -o OUT --python .venv/bin/python [--threads 1,2] [--rounds 5]

`python` has benchmarks/requirements-rivals.txt; --python is one that has qcompile[export]. Everyone starts from the
same folder (config.json, model.safetensors, tokenizer.json). llama.cpp is built for this machine from the source
package of llama-cpp-python, which pip downloads. What lies in OUT is not made again.

Scores: KL(float ‖ model) of every engine's own output, its caches and its rounding of activations included, token by
token over the first windows of benchmarks/text. Times: a process for each row, which take turns, round by round;
medians. Tokens per second of the clock, and of processor time, which other work on the machine disturbs less (with
one thread they are the same on a quiet one). MB: resident memory that the model added, loaded and after all runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rivals_engines import ROOM

HERE = Path(__file__).parent
LLAMA = "llama-cpp-python==0.3.36"
TEXTS = sorted((HERE / "text").glob("eval-*.txt"))


@dataclass(frozen=True)
class Job:
    """Where things lie. python: has qcompile. group: of qcompile's and OpenVINO's weights."""

    source: Path
    output: Path
    python: Path
    group: int

    @property
    def llama(self) -> Path:
        """The source of llama.cpp's Python package."""
        return self.output / LLAMA.replace("==", "-").replace("-", "_", 2)

    def qcompile(self, *arguments: object) -> None:
        """Run a command of qcompile."""
        run(self.python, "-m", "qcompile.compiler.cli", *arguments)


@dataclass(frozen=True)
class Rival:
    """A row of the table. make: writes the model, given the job and its path. own: run by the Python of qcompile."""

    engine: str
    model: str
    make: Callable[[Job, Path], None]
    own: bool = False


def float_export(job: Job, model: Path) -> None:
    job.qcompile("export", job.source, "--for", "genai", "-o", model.parent)


def our_compile(job: Job, model: Path) -> None:
    job.qcompile(job.output / "float/model.onnx", "--for", "genai", "--group-size", job.group, "-o", model.parent)


def builder_compile(job: Job, model: Path) -> None:
    builder(job, job.output / "builder-float", "fp32")
    job.qcompile(job.output / "builder-float/model.onnx", "--for", "genai", "--group-size", job.group, "-o", model)


def builder_int4(job: Job, model: Path) -> None:
    builder(job, model, "int4")


def builder(job: Job, folder: Path, precision: str) -> None:
    """onnxruntime-genai's own export, its defaults."""
    if not (folder / "genai_config.json").exists():
        cache = job.output / "builder-cache"
        command = ("-m", "onnxruntime_genai.models.builder", "-i", job.source, "-o", folder, "-c", cache)
        run(sys.executable, *command, "-p", precision, "-e", "cpu")
        shutil.rmtree(cache, ignore_errors=True)


def gguf(job: Job, model: Path) -> None:
    """Round to nearest as llama-quantize does it: no importance matrix."""
    build_llama(job)
    whole = job.output / "float.gguf"
    source = job.llama / "vendor/llama.cpp"
    if not whole.exists():
        script = source / "convert_hf_to_gguf.py"
        run(sys.executable, script, job.source, "--outfile", whole, "--outtype", "f32")
    run(job.output / "llama-build/bin/llama-quantize", whole, model, model.stem)


def build_llama(job: Job) -> None:
    """llama.cpp with every instruction of this machine."""
    build = job.output / "llama-build"
    if (build / "bin/llama-quantize").exists():
        return
    run(sys.executable, "-m", "pip", "download", LLAMA, "--no-deps", "--no-binary", ":all:", "-d", job.output)
    with tarfile.open(next(job.output.glob("llama_cpp_python*.tar.gz"))) as archive:
        archive.extractall(job.output, filter="data")
    options = ["GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_SERVER=OFF"]
    options += ["LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_TOOLS=ON", "CMAKE_BUILD_TYPE=Release"]
    cmake = Path(sys.executable).with_name("cmake")
    run(cmake, "-S", job.llama / "vendor/llama.cpp", "-B", build, *(f"-D{option}" for option in options))
    run(cmake, "--build", build, "--target", "llama-quantize", "-j", os.cpu_count())


def openvino_int4(job: Job, model: Path) -> None:
    """The float export with its caches as state, compressed by NNCF: int4 in groups, the head in int8."""
    import nncf
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    graph = openvino.convert_model(job.output / "float/model.onnx")
    pasts = [name for port in graph.inputs for name in port.names if name.startswith("past_key_values")]
    apply_make_stateful_transformation(graph, {past: past.replace("past_key_values", "present") for past in pasts})
    mode = nncf.CompressWeightsMode.INT4_ASYM
    openvino.save_model(nncf.compress_weights(graph, mode=mode, group_size=job.group), model, compress_to_fp16=False)


RIVALS = {
    "float, ONNX Runtime": Rival("qcompile", "float/model.onnx", float_export, own=True),
    "qcompile, our export, our runtime": Rival("qcompile", "ours/model.onnx", our_compile, own=True),
    "qcompile, our export, in genai": Rival("genai", "ours", our_compile),
    "qcompile, genai's graph, in genai": Rival("genai", "builder-ours", builder_compile),
    "genai's own int4": Rival("genai", "builder-int4", builder_int4),
    "llama.cpp Q4_0": Rival("llama", "Q4_0.gguf", gguf),
    "llama.cpp Q4_K_M": Rival("llama", "Q4_K_M.gguf", gguf),
    "OpenVINO int4": Rival("openvino", "openvino/model.xml", openvino_int4),
}
COMMANDS = ("make", "score", "time", "table")


def main() -> None:
    """Make, score or time, and print a Markdown table of all that is known by then."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("source", type=Path, help="Hugging Face folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="a Python that has qcompile[export]")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens, of each text")
    parser.add_argument("--only", action="append", help="rows that contain this; may repeat")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    job = Job(args.source.resolve(), args.output.resolve(), args.python.absolute(), args.group_size)
    check_context(job)
    chosen = {name: rival for name, rival in RIVALS.items() if any(part in name for part in args.only or [""])}
    if args.what == "make":
        for rival in chosen.values():
            model = job.output / rival.model
            last = model / "genai_config.json" if rival.engine == "genai" else model  # what is written last
            if not last.exists():
                model.parent.mkdir(exist_ok=True)
                rival.make(job, model)
    elif args.what == "score":
        score(job, chosen, args.windows)
    elif args.what == "time":
        for threads in args.threads.split(","):
            measure(job, chosen, threads, args.rounds)
    print(table(job))


def check_context(job: Job) -> None:
    """All caches are made for ROOM tokens, so that what they take of memory can be compared."""
    told = json.loads((job.source / "config.json").read_text(encoding="utf-8"))
    context = told.get("max_position_embeddings", ROOM)
    if context < ROOM:
        sys.exit(f"{job.source} has a context of {context} tokens, and {ROOM} are measured: take another model")


def score(job: Job, chosen: dict[str, Rival], count: int) -> None:
    """Everyone against the float model, which goes first."""
    ids = windows(job, count)
    for name, rival in chosen.items():
        result, make = job.output / f"score-{name}.json", rival.model.startswith("float/")
        if not result.exists():
            found = {}
            for text in TEXTS:
                np.save(job.output / "ids.npy", ids[text.stem])
                reference = job.output / f"reference-{text.stem}.npy"
                options = [
                    "--ids",
                    job.output / "ids.npy",
                    "--reference",
                    reference,
                    "--threads",
                    1,
                    *(["--make"] if make else []),
                ]
                found[text.stem] = worker(job, rival, "score", *options)
            result.write_text(json.dumps(found), encoding="utf-8")


def measure(job: Job, chosen: dict[str, Rival], threads: str, rounds: int) -> None:
    """In turns; each round's figures are kept."""
    np.save(job.output / "ids-time.npy", windows(job, 4)[TEXTS[0].stem])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for turn in range(rounds):
        print(f"{threads} threads, round {turn + 1} of {rounds}", flush=True)
        for name, rival in chosen.items():
            options = ["--ids", job.output / "ids-time.npy", "--threads", threads]
            found[name].append(worker(job, rival, "time", *options))
            (job.output / f"time-{threads}-{name}.json").write_text(json.dumps(found[name]), encoding="utf-8")


def windows(job: Job, count: int) -> dict[str, np.ndarray]:
    """(count, 512) ids from the start of each text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.source / "tokenizer.json"))
    encoded = {
        text.stem: tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False) for text in TEXTS
    }
    return {name: np.array(text.ids[: count * 512], np.int64).reshape(count, 512) for name, text in encoded.items()}


def worker(job: Job, rival: Rival, what: str, *options: object) -> dict[str, float]:
    """The answer of one process."""
    python = job.python if rival.own else Path(sys.executable)
    path = {"LLAMA_CPP_LIB_PATH": str(job.output / "llama-build/bin"), "PYTHONPATH": str(job.llama)}
    environment = dict(os.environ) | (path if rival.engine == "llama" else {})
    command = [python, HERE / "rivals_engines.py", what, rival.engine, job.output / rival.model, *options]
    told = subprocess.run(
        [str(word) for word in command], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    answer: dict[str, float] = json.loads(told.stdout.splitlines()[-1])
    return answer


def table(job: Job) -> str:
    """All that lies in the folder: a table a number of threads, then scores and sizes."""
    lines = []
    for threads in sorted({path.name.split("-")[1] for path in job.output.glob("time-*.json")}):
        lines += ["", f"{threads} thread(s), tokens/s (of processor time)", ""]
        for name in RIVALS:
            path = job.output / f"time-{threads}-{name}.json"
            if path.exists():
                lines += timed_row(name, json.loads(path.read_text(encoding="utf-8")), first=lines[-1] == "")
    lines += ["", f"| | {' | '.join(f'KL {text.stem} | same first %' for text in TEXTS)} | file MB |"]
    lines += ["|---|" + "---|" * (2 * len(TEXTS) + 1)]
    for name, rival in RIVALS.items():
        path, cells = job.output / f"score-{name}.json", []
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for text in TEXTS:
            values = found.get(text.stem, {})
            cells += [f"{np.mean(values['kl']):.4f} | {100 * np.mean(values['agreement']):.1f}" if values else " | "]
        lines += [f"| {name} | {' | '.join(cells)} | {size(job.output / rival.model):.1f} |"]
    return "\n".join(lines)


def timed_row(name: str, rounds: list[dict[str, float]], first: bool) -> list[str]:
    """Medians, with a heading before the first row."""
    middle = {key: statistics.median(turn[key] for turn in rounds) for key in rounds[0]}
    speeds = [key for key in middle if f"{key}_cpu" in middle]
    cells = [f"{middle[key]:.0f} ({middle[f'{key}_cpu']:.0f})" for key in speeds]
    memory = f"{middle['load_mb']:.0f} / {middle['after_mb']:.0f}"
    row = f"| {name} | {' | '.join(cells)} | {middle['load_s']:.2f} | {memory} |"
    heading = [f"| | {' | '.join(speeds)} | load s | MB loaded / after |", "|---" * (len(speeds) + 3) + "|"]
    return [*(heading if first else []), row]


def size(model: Path) -> float:
    """MB of the graph and its weights: tokenizers, reports and libraries do not count."""
    if model.suffix == ".gguf":
        files = [model]
    else:
        folder = model if model.is_dir() else model.parent
        files = [path for path in folder.glob("model*") if path.suffix in (".onnx", ".data", ".xml", ".bin")]
    return sum(path.stat().st_size for path in files if path.exists()) / 1e6


def run(*words: object) -> None:
    """Run a command, shown first."""
    command = [str(word) for word in words]
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

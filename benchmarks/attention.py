"""Steps and prompts of compiled decoders: the library's attention over their caches against ONNX Runtime's.

    qcompile DECODER.onnx --for genai -o half; qcompile DECODER.onnx --for genai --caches float -o float
    python benchmarks/attention.py float/model.onnx half/model.onnx [coded/model.onnx …] [--threads 1,2]

Each file runs as it is, and a file whose caches ONNX Runtime's GroupQueryAttention knows (float, int8) with that one,
too. Caches hold random numbers; past and present are one buffer. All take turns, rounds of 8 steps or one prompt; a
cell is the median of milliseconds, of processor time with one thread, of wall time with more.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from qcompile.runtime.sessions import session

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Decoder:
    """A session with buffers for its caches."""

    def __init__(self, model: bytes, folder: Path, threads: int, room: int) -> None:
        self.session = session(model, folder=folder, threads=threads, growing=True)
        self.names = {own.name for own in self.session.get_inputs()}
        self.binding, self.threads = self.session.io_binding(), threads
        rng = np.random.default_rng(0)
        for own in self.session.get_inputs():
            if not own.name.startswith("past"):
                continue
            x = rng.standard_normal((1, own.shape[1], room, own.shape[3])).astype(np.float32) * 0.3
            kind = _TYPES[own.type]
            array = np.clip(x * 60, -127, 127).astype(kind) if kind is np.int8 else x.astype(kind)
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(own.name, value)
            self.binding.bind_ortvalue_output(own.name.replace("past_key_values", "present"), value)

    def milliseconds(self, rows: int, past: int, times: int) -> float:
        """Of one run of so many rows behind so many cached ones."""
        feeds = {"input_ids": np.arange(5, 5 + rows)[None], "attention_mask": np.ones((1, past + rows), np.int64)}
        feeds["position_ids"] = np.arange(past, past + rows)[None]
        for name, array in feeds.items():
            if name in self.names:
                self.binding.bind_cpu_input(name, array)
        self.binding.bind_output("logits")
        clock = time.process_time if self.threads == 1 else time.perf_counter
        started = clock()
        for _ in range(times):
            self.session.run_with_iobinding(self.binding)
        return (clock() - started) / times * 1e3


def variants(path: Path) -> dict[str, bytes]:
    """A file as it is, and with ONNX Runtime's attention; by what the table calls them."""
    model = onnx.load(path, load_external_data=False)
    own = {f"{path.parent.name}, the library's": model.SerializeToString()}
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == ("qcompile", "GroupQueryAttention")]
    for node in nodes:
        node.domain = "com.microsoft"
    return own | ({f"{path.parent.name}, ONNX Runtime's": model.SerializeToString()} if nodes else {})


def main() -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--behind", default="64,512,2048", help="cached tokens of steps")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    behind = [int(text) for text in args.behind.split(",")]
    for threads in [int(text) for text in args.threads.split(",")]:
        room = max(*behind, args.prompt) + 64
        made: dict[str, Any] = {
            name: Decoder(model, path.parent, threads, room)
            for path in args.models
            for name, model in variants(path).items()
        }
        cases = {f"step behind {past}": (1, past, 8) for past in behind}
        cases[f"prompt of {args.prompt}"] = (args.prompt, 0, 1)
        found: dict[tuple[str, str], list[float]] = {}
        for case, sizes in cases.items():
            for number in range(args.rounds + 1 if sizes[0] == 1 else 4):
                for name, decoder in made.items():
                    taken = decoder.milliseconds(*sizes)
                    if number:
                        found.setdefault((name, case), []).append(taken)
        print(f"\n{threads} thread(s), ms\n\n| |{'|'.join(f' {case} ' for case in cases)}|\n|---{'|---' * len(cases)}|")
        for name in made:
            print(f"| {name} |{'|'.join(f' {statistics.median(found[name, case]):.2f} ' for case in cases)}|")


if __name__ == "__main__":
    main()

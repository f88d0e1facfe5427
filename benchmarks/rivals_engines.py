"""One decoder in one process: timed, or scored against float log-probabilities. What rivals.py starts for every row.

    PYTHON benchmarks/rivals_engines.py time  ENGINE MODEL --ids IDS.npy --threads N
    PYTHON benchmarks/rivals_engines.py score ENGINE MODEL --ids IDS.npy --reference FLOAT.npy [--make]

PYTHON is one that has the engine. All engines answer the same call: tokens in, the scores of the token behind the last
of them out. So every one is scored the same way, token by token behind its own caches, and prompts are what an
application gives: scores of the last row alone, where the engine can leave the others out.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]

PROMPT, STEPS, BEHIND = 512, 32, (64, 512)
# Tokens for which caches have room: the longest prompt, its steps and those that warm up.
ROOM = 1024


class Engine(Protocol):
    """One sequence at a time, of which `feed` takes the next tokens."""

    def restart(self) -> None:
        """Forget the sequence."""

    def feed(self, ids: list[int]) -> Row:
        """Scores (V,) of the token behind these."""


class Qcompile:
    """The runtime in this repository: ONNX Runtime, the native kernels where a file has their operators."""

    def __init__(self, model: Path, threads: int) -> None:
        from qcompile.compiler.data.inputs import input_plan
        from qcompile.compiler.files.load import load_model
        from qcompile.runtime.sessions import session

        self._plan = input_plan(load_model(model))
        self._session = session(model, threads=threads, accuracy_level=4)
        self._decoding: Any = None
        gc.collect()

    def restart(self) -> None:
        from qcompile.compiler.data.decoding import Decoding

        self._decoding = None
        self._decoding = Decoding(self._session, self._plan)

    def feed(self, ids: list[int]) -> Row:
        return np.asarray(self._decoding.logits(np.array([ids], np.int64))[0, -1], np.float32)


class Genai:
    """onnxruntime-genai: a folder with genai_config.json."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(model))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og, self._model = og, og.Model(config)
        self._generator: Any = None

    def restart(self) -> None:
        self._generator = None  # its caches go before there are others
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=ROOM, do_sample=False)
        self._generator = self._og.Generator(self._model, params)

    def feed(self, ids: list[int]) -> Row:
        self._generator.append_tokens(np.array([ids], np.int32))
        return np.asarray(self._generator.get_logits()[0, -1], np.float32)


class Llama:
    """llama.cpp through the C interface of its library, which LLAMA_CPP_LIB_PATH names, with its own defaults."""

    def __init__(self, model: Path, threads: int) -> None:
        import llama_cpp.llama_cpp as api

        self._api = api
        self._quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = ROOM, threads, threads
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"{model}: llama.cpp does not load it")
        self._width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def restart(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def feed(self, ids: list[int]) -> Row:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        scores = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(scores, (self._width,)).copy()


class OpenVino:
    """An OpenVINO model whose caches are its state."""

    def __init__(self, model: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self._tensor = openvino.Tensor
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._names = {name for port in self._compiled.inputs for name in port.names}

    def restart(self) -> None:
        for state in self._request.query_state():  # empty caches of one sequence
            _, heads, _, width = state.state.shape
            state.state = self._tensor(np.zeros((1, heads, 0, width), np.float32))
        self._done = 0

    def feed(self, ids: list[int]) -> Row:
        self._done, begin = self._done + len(ids), self._done
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self._done), np.int64),
            "position_ids": np.arange(begin, self._done, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found = self._request.infer({name: array for name, array in feeds.items() if name in self._names})
        return np.asarray(next(iter(found.values()))[0, -1], np.float32)


ENGINES = {"qcompile": Qcompile, "genai": Genai, "llama": Llama, "openvino": OpenVino}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "score"))
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True, help="(windows, tokens)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", type=Path, help="(windows, tokens - 1, V): log-probabilities of the float model")
    parser.add_argument("--make", action="store_true", help="write the reference, of this engine")
    args = parser.parse_args()
    ids = np.load(args.ids)
    if args.what == "time":
        result = measure(args.engine, args.model, args.threads, ids)
    else:
        result = score(ENGINES[args.engine](args.model, args.threads), ids, args.reference, args.make)
    json.dump(result, sys.stdout)


def measure(name: str, model: Path, threads: int, ids: npt.NDArray[np.int64]) -> dict[str, float]:
    """Seconds and MB to load, MB after all runs; tokens per second by the clock, and by processor time (`_cpu`)."""
    imported(name)
    before, started = resident(), time.perf_counter()
    engine: Engine = ENGINES[name](model, threads)
    result = {"load_s": time.perf_counter() - started, "load_mb": resident() - before}
    tokens = [int(token) for token in ids.reshape(-1)]
    for _ in range(2):  # the first warms up
        engine.restart()
        with timed(result, f"prefill {PROMPT}", PROMPT):
            engine.feed(tokens[:PROMPT])
    for behind in BEHIND:
        engine.restart()
        row = engine.feed(tokens[:behind])
        for _ in range(2):
            row = engine.feed([int(row.argmax())])
        with timed(result, f"decode @{behind}", STEPS):
            for _ in range(STEPS):
                row = engine.feed([int(row.argmax())])
    return result | {"after_mb": resident() - before}


def imported(name: str) -> None:
    """Load the libraries of an engine, which are no part of its model's memory."""
    if name == "qcompile":
        import onnxruntime  # noqa: F401

        import qcompile.compiler.data.decoding
        import qcompile.runtime.sessions  # noqa: F401
    elif name == "genai":
        import onnxruntime_genai  # noqa: F401
    elif name == "llama":
        import llama_cpp.llama_cpp  # noqa: F401
    else:
        import openvino

        openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")


@contextmanager
def timed(result: dict[str, float], name: str, tokens: int) -> Iterator[None]:
    """The last turn counts."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    result[name] = tokens / (time.perf_counter() - clock)
    result[f"{name}_cpu"] = tokens / (time.process_time() - processor)


def resident() -> float:
    """MB of this process in memory, files that are mapped with them."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def score(engine: Engine, ids: npt.NDArray[np.int64], reference: Path, make: bool) -> dict[str, list[float]]:
    """KL(float ‖ engine) in nats and share of equal first choices, mean of the tokens of each window but its first."""
    result: dict[str, list[float]] = {"kl": [], "agreement": []}
    kept = np.lib.format.open_memmap(reference, mode="r") if not make else None
    for index, window in enumerate(ids):
        engine.restart()
        rows = np.stack([log_softmax(engine.feed([int(token)])) for token in window[:-1]])
        if kept is None:
            kept = np.lib.format.open_memmap(reference, mode="w+", shape=(len(ids), *rows.shape), dtype=np.float32)
        if make:
            kept[index] = rows
        expected = kept[index].astype(np.float64)
        rows = rows[:, : expected.shape[1]]  # some pad their vocabulary
        result["kl"].append(float((np.exp(expected) * (expected - rows)).sum(-1).mean()))
        result["agreement"].append(float((expected.argmax(-1) == rows.argmax(-1)).mean()))
    return result


def log_softmax(row: Row) -> npt.NDArray[np.float64]:
    """Log-probabilities of scores (V,)."""
    shifted = row.astype(np.float64) - row.max()
    values: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return values


if __name__ == "__main__":
    main()

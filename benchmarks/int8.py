"""Int8 (W8A8) models, ours and those of onnxruntime.quantization, on equal terms: accuracy, size, speed.

    python benchmarks/int8.py data  FLOAT.onnx -o FOLDER            calibration batches as .npz
    python benchmarks/int8.py peers FLOAT.onnx -o OUT               onnxruntime's models, each in OUT/<peer>/
    python benchmarks/int8.py score FLOAT.onnx [X.onnx ...] [--peers OUT] [--json FILE]
    python benchmarks/int8.py speed FLOAT.onnx [X.onnx ...] [--threads 1,2] [--rounds 9] [--json FILE]

FLOAT.onnx is a decoder or an encoder with tokenizer.json beside it, or PP-OCR's detector or recogniser; what is
measured follows from its inputs and outputs. Needs qcompile with onnxruntime, and Pillow for the pictures
(`pip install pillow`). Peers run one at a time, each in a process of its own; what is done already is not done again,
and one that fails is recorded with its error while the others go on.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from int8_data import calibration, model_kind, write_npz
from int8_metrics import score, score_table
from int8_peers import PEERS, made_models, peer_table, run_apart, work
from int8_speed import speed, speed_table


def main() -> int:
    args = parse_arguments()
    return int(args.command(args) or 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    data = commands.add_parser("data", help="write the calibration batches as .npz files")
    data.set_defaults(command=data_command)

    peers = commands.add_parser("peers", help="quantize with onnxruntime")
    peers.add_argument("--only", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)")
    peers.add_argument("--windows", type=int, default=32, help="calibration batches (default 32)")
    peers.add_argument("--threads", type=int, default=1, help="threads of calibration runs (default 1)")
    peers.add_argument("--retry", action="store_true", help="run those again that failed before")
    peers.add_argument("--worker", help=argparse.SUPPRESS)
    peers.set_defaults(command=peers_command)

    scores = commands.add_parser("score", help="distance to the float model")
    scores.add_argument("--tokens", type=int, default=4096, help="tokens of each text, for decoders (default 4096)")
    scores.set_defaults(command=score_command)

    times = commands.add_parser("speed", help="paired timing, each model in a process of its own")
    times.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    times.add_argument("--rounds", type=int, default=9, help="turns of each model (default 9)")
    times.set_defaults(command=speed_command)

    for command in (data, peers, scores, times):
        command.add_argument("model", type=Path, metavar="FLOAT.onnx")
    for command in (data, peers):
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    for command in (scores, times):
        command.add_argument("others", nargs="*", type=Path, metavar="X.onnx")
        command.add_argument("--also", nargs="+", type=Path, default=[], metavar="X.onnx", help="more of them")
        command.add_argument("--peers", type=Path, metavar="OUT", help="and what `peers` made there")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too (score: and reuse)")
    return parser.parse_args()


def data_command(args: argparse.Namespace) -> None:
    """Calibration batches on disk, for `qcompile --calibration`."""
    paths = write_npz(calibration(model_kind(args.model), args.model), args.output)
    print(f"{len(paths)} batches in {args.output}")


def peers_command(args: argparse.Namespace) -> int | None:
    """Every peer in a process of its own, then their table."""
    if args.worker:
        work(args.worker, args.model, args.output / args.worker, args.windows, args.threads)
        return None
    peers = args.only.split(",")
    if unknown := set(peers) - set(PEERS):
        raise SystemExit(f"unknown peers {sorted(unknown)}: choose from {', '.join(PEERS)}")
    for peer in peers:
        command = [sys.executable, __file__, "peers", args.model, "-o", args.output, "--worker", peer]
        command += ["--windows", args.windows, "--threads", args.threads]
        run_apart(list(map(str, command)), peer, args.output / peer, retry=args.retry)
    print(peer_table(args.output))
    return None


def score_command(args: argparse.Namespace) -> None:
    """The table of distances. Rows that --json has already, of the same files and float model, are not made again."""
    kind, models = model_kind(args.model), models_of(args)
    stamps = {str(model): f"{model.stat().st_mtime_ns} {args.model.resolve()} {args.tokens}" for model in models}
    saved = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    known = {row["file"]: row for row in saved if stamps.get(row["file"]) == row.get("stamp")}
    made = score(kind, args.model, [model for model in models if str(model) not in known], tokens=args.tokens)
    known |= {str(row["file"]): row | {"stamp": stamps[str(row["file"])]} for row in made}
    rows = [known[str(model)] for model in models]
    print(score_table(kind, rows))
    save(args.json, rows)


def speed_command(args: argparse.Namespace) -> None:
    """The table of times."""
    threads = [int(number) for number in args.threads.split(",")]
    result = speed(args.model, models_of(args), threads, args.rounds)
    print(speed_table(result))
    save(args.json, result)


def models_of(args: argparse.Namespace) -> list[Path]:
    """The models named, then those of the peers' folder."""
    models = [*args.others, *args.also, *(made_models(args.peers) if args.peers else [])]
    for model in models:
        if not model.is_file():
            raise SystemExit(f"{model}: no such model file")
    return models


def save(path: Path | None, content: object) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())

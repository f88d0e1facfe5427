"""runtime/cluster.py: two nodes of Ray's own test cluster compute what one process does, also when one of them dies."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import qcompile
from qcompile.compiler.api.sensitivity import rank_nodes
from qcompile.compiler.cli import main
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.mixed import ranking
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.sweep import run as sweeping
from qcompile.compiler.sweep.scoring import Evaluation
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.workers import Here, elsewhere, mapped
from qcompile.runtime import cluster
from qcompile.runtime.cluster import Cluster, clustered

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="the extra cluster (Ray) is not installed")
_STORE = 100 << 20  # bytes of each node's object store


class Nodes:
    """Two nodes of one processor each, whose second one can be lost and had anew."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        first = {"num_cpus": 1, "object_store_memory": _STORE, "include_dashboard": False}
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=first)
        self.second: Any = None

    @property
    def address(self) -> str:
        """With two nodes there."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=1, object_store_memory=_STORE)
        return str(self.cluster.address)

    def lose(self) -> None:
        """Kill the second one, with all its processes."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """One cluster for all tests."""
    made = Nodes()
    yield made
    made.cluster.shutdown()


def _slow(given: Any, x: Any, number: int) -> tuple[float, int]:
    time.sleep(0.4)
    return float(given @ x) + number, os.getpid()


def _refused(number: int) -> int:
    raise UserError(f"item {number} cannot be")


def test_results_are_in_order_and_of_several_processes(nodes: Nodes) -> None:
    """Numbers, not arrival, order them; arrays that items share and those of all are what they were."""
    random = np.random.default_rng(0)
    given, x = random.standard_normal((2, 1000), np.float32)
    wanted = [_slow(given, x, number)[0] for number in range(6)]
    with clustered(nodes.address):
        found = mapped(_slow, range(6), load=lambda number: (x, number), given=(given,))
    assert [value for value, _ in found] == wanted
    assert len({process for _, process in found}) == 2
    assert os.getpid() not in {process for _, process in found}


def _blas(number: int) -> int:
    return max(own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas")


def test_blas_has_as_many_threads_as_the_caller(nodes: Nodes) -> None:
    """Its sums depend on them: those in force where the items are given out, inside of limits as well."""
    with clustered(nodes.address):
        for threads in (3, 1, 2):
            with threadpool_limits(threads, "blas"):
                assert mapped(_blas, range(2), load=lambda number: (number,)) == [threads] * 2
        assert mapped(_blas, range(2), load=lambda number: (number,)) == [_blas(0)] * 2


def _told(given: str, number: int) -> str:
    return f"{given} {number}"


def test_workers_that_outlive_a_block_compute_with_what_the_next_one_gives(nodes: Nodes) -> None:
    """Under one Ray of the caller's own, as a notebook has it, for two blocks."""
    import ray

    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    try:
        for given in ("first", "second"):
            with clustered(nodes.address):
                found = mapped(_told, range(4), load=lambda number: (number,), given=(given,))
            assert found == [f"{given} {number}" for number in range(4)]
    finally:
        ray.shutdown()


def test_this_process_does_the_same() -> None:
    """The other workers: this thread, or several."""
    given, load = (np.ones(2),), lambda number: (np.ones(2), number)
    found = dict(Here().each(_slow, range(3), load=load, given=given))
    assert [found[number][0] for number in range(3)] == [2, 3, 4]
    assert [value for value, _ in mapped(_slow, range(3), load=load, given=given)] == [2, 3, 4]


def test_an_error_is_what_it_was(nodes: Nodes) -> None:
    """Its class and its one line, as of this process."""
    with clustered(nodes.address), pytest.raises(UserError, match=r"^item 0 cannot be$"):
        mapped(_refused, [0], load=lambda number: (number,))


def test_workers_with_other_native_kernels_are_refused(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would round otherwise, and bytes would depend on who computed what."""
    monkeypatch.setattr(cluster, "library_digest", lambda: "another build")
    with clustered(nodes.address), pytest.raises(UserError, match="has other native kernels than this machine"):
        mapped(_told, range(2), load=lambda number: (number,), given=("first",))


def test_tasks_of_a_lost_node_are_computed_again(nodes: Nodes) -> None:
    """One of two dies while both work: every item has its result."""
    with clustered(nodes.address):
        workers, found = elsewhere(), dict[int, float]()
        assert workers is not None
        given = (np.ones(5),)
        for number, (value, _) in workers.each(_slow, range(8), load=lambda n: (np.ones(5), n), given=given):
            found[number] = value
            if len(found) == 2:
                nodes.lose()
    assert found == {number: 5.0 + number for number in range(8)}


BASE = Recipe(passes=parse_passes("pack"), group_size=32, samples=4, context=32)
GRID = {"bits": [4, 8], "passes": ["pack", "smooth,pack", "awq,pack"]}


def test_a_sweep_whose_node_dies_is_that_of_one_machine(
    nodes: Nodes, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All figures of all rows but their times, and every byte of every model."""
    monkeypatch.setattr(sweeping, "write_plots", lambda *_: [])
    model = bench.save(tiny_decoder(layers=1))

    def swept(name: str, watcher: Any = None) -> Any:
        given = {"recipe": BASE, "calibration": [str(bench.text)], "evaluation": Evaluation(context=32, tokens=128)}
        folder = bench.folder / name
        made = sweeping.sweep(model, GRID, output=folder, keep_models=True, watcher=watcher, **given)
        figures = [asdict(replace(row, seconds=0.0)) for row in made.rows]
        return figures, {file.relative_to(folder): file.read_bytes() for file in folder.rglob("models/*/model*[xa]")}

    with clustered(nodes.address):
        spread = swept("spread", _AtEnd(nodes.lose))
    alone = swept("alone")
    assert spread[0] == alone[0]
    assert spread[1] == alone[1]
    assert len(alone[1]) == 12, "a model and its data each"


class _AtEnd(sweeping.Quiet):
    """Does something once, when the first row has ended."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done: Callable[[], None] | None = done

    def end(self, sweep: Any, row: Any, left: float) -> None:
        """Once."""
        if self.done is not None:
            self.done()
            self.done = None


def test_sensitivities_are_those_of_one_machine(nodes: Nodes, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same effects to the last bit, and so the same order."""
    monkeypatch.setattr(ranking.RankingCache, "get", lambda self: None)
    model = bench.save(tiny_decoder(layers=1))

    def ranked() -> Any:
        recipe = Recipe(passes=parse_passes("qdq"), bits=8, samples=4, context=32)
        return replace(rank_nodes(model, recipe, calibration=[str(bench.text)]), seconds=0.0)

    with clustered(nodes.address):
        spread = ranked()
    assert spread == ranked()
    assert len(spread.nodes) > 4


def test_the_command_compiles_to_the_same_bytes(nodes: Nodes, bench: Any) -> None:
    """--cluster changes who computes, and nothing else."""
    model = bench.save(tiny_decoder(layers=1))

    def compiled(*options: str) -> dict[str, bytes]:
        given = ["--passes", "smooth,awq,gptq,pack", "--calibration", str(bench.text), *options]
        assert bench.run(model, *given) == 0
        return {file.name: file.read_bytes() for file in (bench.folder / "out").glob("model*[xa]")}

    assert compiled("--cluster", nodes.address) == compiled()


def test_keywords_are_what_the_option_is(nodes: Nodes, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """compile, sensitivity and sweep with `cluster=`: what one process does; behind the call none is left."""
    monkeypatch.setattr(ranking.RankingCache, "get", lambda self: None)
    monkeypatch.setattr(sweeping, "write_plots", lambda *_: [])
    model, text = bench.save(tiny_decoder(layers=1)), str(bench.text)
    quick: dict[str, Any] = {"samples": 4, "context": 32}
    given, each = list[str](), Cluster.each

    def counted(workers: Cluster, compute: Any, items: Any, **more: Any) -> Any:
        given.append(compute.__name__)
        return each(workers, compute, items, **more)

    monkeypatch.setattr(Cluster, "each", counted)

    def made(where: str, **cluster: Any) -> list[Any]:
        folder = bench.folder / where
        qcompile.compile(
            model, "gptq,pack", calibration=text, output=folder / "m.onnx", group_size=32, **quick, **cluster
        )
        ranked = qcompile.sensitivity(model, "qdq", calibration=text, **quick, **cluster)
        rows = qcompile.sweep(
            model,
            {"bits": [4, 8]},
            output=folder / "sweep",
            recipe=BASE,
            calibration=text,
            context=32,
            tokens=64,
            **cluster,
        ).rows
        written = {file.name: file.read_bytes() for file in folder.glob("m*[xa]")}
        return [written, ranked.nodes, [asdict(replace(row, seconds=0.0)) for row in rows]]

    spread = made("spread", cluster=nodes.address)
    assert elsewhere() is None
    computed, given[:] = set(given), []
    assert {"watched", "_distance", "figures"} <= computed, "one of each call"
    assert spread == made("alone")
    assert not given
    with pytest.raises(UserError, match=r"^cluster: no Ray can be reached at nowhere "):
        qcompile.compile(model, "pack", output=bench.folder / "none.onnx", cluster="nowhere")


class _Advancing(Silent):
    """Does something once, when so many rows went through a segment."""

    def __init__(self, rows: int, done: Callable[[], None]) -> None:
        self.rows, self.done = rows, done

    def advance(self, rows: int) -> None:
        """Rows more."""
        self.rows, before = self.rows - rows, self.rows
        if before > 0 >= self.rows:
            self.done()


@pytest.mark.parametrize(
    ("passes", "tasks"),
    [
        ("smooth,awq,gptq,pack", {"watched", "run", "_beside", "_tried"}),
        ("smooth,qdq", {"watched", "run", "_losses"}),
    ],
)
def test_a_compile_whose_node_dies_is_that_of_one_machine(
    nodes: Nodes, bench: Any, monkeypatch: pytest.MonkeyPatch, passes: str, tasks: set[str]
) -> None:
    """Units of calibration batches are watched, batches run, candidates judged, chunks of columns rounded by two nodes,
    and then by one: the same bytes.
    """
    model, settings = bench.save(tiny_decoder(ffn=1100)), {"samples": 20, "bits": 4 if "pack" in passes else 8}
    recipe = Recipe(passes=parse_passes(passes), context=32, group_size=20, **settings)
    seen, each = set[str](), Cluster.each

    def told(workers: Cluster, compute: Any, items: Any, **more: Any) -> Any:
        seen.add(compute.__name__)
        return each(workers, compute, items, **more)

    monkeypatch.setattr(Cluster, "each", told)

    def compiled(name: str, progress: Silent) -> dict[str, bytes]:
        target = bench.folder / name / "model.onnx"
        compile_model(model, recipe, output=target, calibration=[str(bench.text)], progress=progress)
        return {file.name: file.read_bytes() for file in target.parent.glob("model*[xa]")}

    with clustered(nodes.address):
        spread = compiled("spread", _Advancing(1000, nodes.lose))
    assert nodes.second is None, "it was killed"
    assert tasks <= seen
    assert spread == compiled("alone", Silent())


def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str], bench: Any) -> None:
    """One line, before any work."""
    bench.refuses(
        capsys, bench.save(tiny_decoder(layers=1)), ["--cluster", "nowhere"], "no Ray can be reached at nowhere"
    )


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What to install is said where it is not."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert main(["compile", "x.onnx", "--cluster", "auto"]) == 2
    assert "pip install 'qcompile-onnx[cluster]'" in capsys.readouterr().err
    assert not Path("x.onnx").exists()

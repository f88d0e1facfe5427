"""Computed where? Here, or on Ray's machines (the extra `cluster`): one task an item.

Ray schedules the tasks, and runs what a lost machine had again.

Invariant: what comes back is what this process would have computed, bit by bit, on machines with the same versions and
the same kind of processor (other native kernels are refused): a task computes one item alone, no sum follows the order
of arrival, and sessions and BLAS, whose sums depend on their threads, have as many as are in force here where the items
are given out (`Where`): a pass that runs within threadpool_limits(1) has one there as well.
"""

import itertools
import os
import pickle
import platform
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import threadpool_info, threadpool_limits

from qcompile.passes.errors import UserError
from qcompile.passes.library import library_digest
from qcompile.passes.threads import limited
from qcompile.passes.workers import working
from qcompile.runtime.sessions import custom_operators, default_threads, registered_libraries, session_threads

T = TypeVar("T")
R = TypeVar("R")
AUTO = "auto"
_RETRIES = 5  # of a task whose process or machine is lost
_AHEAD = 2  # items for each processor that are loaded and on their way
# In a worker: what all items of the last jobs were given, by the job, and how many of them stay.
_GIVEN: dict[str, tuple[Any, ...]] = {}
_STAY = 2


@dataclass(frozen=True)
class Where:
    """Where names of files begin in this process, and its libraries of operators and threads of sessions and of BLAS.

    blas: the most of any BLAS that is loaded; None without one. kernels: what `library_digest` says.
    """

    folder: Path
    libraries: Sequence[Path]
    threads: int
    blas: int | None
    kernels: str

    @classmethod
    def here(cls) -> "Where":
        """As it is now."""
        blas = max((own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas"), default=None)
        return cls(Path.cwd(), registered_libraries(), default_threads(), blas, library_digest())


class Cluster:
    """Ray at an address, as `passes.workers.Workers`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_computed)

    @property
    def processors(self) -> int:
        """Of all machines that are there now."""
        return max(int(self._ray.cluster_resources().get("CPU", 1)), 1)

    def each(
        self,
        compute: Callable[..., R],
        items: Sequence[T],
        *,
        load: Callable[[T], tuple[Any, ...]],
        given: tuple[Any, ...] = (),
    ) -> Iterator[tuple[int, R]]:
        """As `Workers`. `given`, and what `load` gives, go into the object store: once, however many items share it."""
        job = uuid.uuid4().hex  # workers may outlive this object, and this process
        shared = [self._ray.put(given)]  # in a list: each process takes it once
        where = Where.here()
        waiting, pending = iter(enumerate(items)), dict[Any, int]()
        try:
            while True:
                room = _AHEAD * self.processors - len(pending)
                for number, item in itertools.islice(waiting, max(room, 0)):
                    loaded = [self._ray.put(part) for part in load(item)]
                    pending[self._task.remote(where, job, compute, shared, *loaded)] = number
                if not pending:
                    return
                (done, *_), _ = self._ray.wait(list(pending), num_returns=1)
                number = pending.pop(done)
                yield number, self._got(done)
        finally:
            for left in pending:
                self._ray.cancel(left)

    def _got(self, done: Any) -> Any:
        """The result of a task; what it raised, as this process would have."""
        try:
            return pickle.loads(self._ray.get(done))
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except self._ray.exceptions.RayError as error:
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"the cluster lost a task {_RETRIES + 1} times ({told:.200})") from error


def _computed(where: Where, job: str, compute: Callable[..., R], shared: list[Any], *loaded: Any) -> bytes:
    """In a worker: one item. Its result as bytes: of arrays, Ray would show the caller what it must not change."""
    import ray

    if where.kernels != library_digest():
        raise UserError(
            f"a worker of the cluster, on {platform.node()}, has other native kernels than this machine, with which it "
            "would round otherwise: install the same qcompile-onnx on both"
        )
    if job not in _GIVEN:
        while len(_GIVEN) >= _STAY:
            del _GIVEN[next(iter(_GIVEN))]
        _GIVEN[job] = ray.get(shared[0])
    if where.folder.is_dir():
        os.chdir(where.folder)
    with (
        custom_operators(where.libraries),
        session_threads(where.threads),
        limited(1),
        threadpool_limits(where.blas, "blas"),
    ):
        return pickle.dumps(compute(*_GIVEN[job], *loaded), pickle.HIGHEST_PROTOCOL)


@contextmanager
def clustered(address: str | None) -> Iterator[None]:
    """Inside, Ray's machines compute: of the cluster at an address, or by "auto" of the one that runs here, else of one
    that is started on this machine and ends with the block. None: this process computes.
    """
    if address is None:
        yield
        return
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        _join(ray, address)
    try:
        with working(Cluster(ray)):
            yield
    finally:
        if own:
            ray.shutdown()


def _join(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    own = {name: value for name, value in os.environ.items() if name.startswith("QCOMPILE_")}
    try:
        ray.init(
            address=None if address == AUTO else address,
            log_to_driver=False,
            logging_level="ERROR",
            include_dashboard=None if address != AUTO else False,
            runtime_env={"env_vars": own},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or ["?"])[0]
        raise UserError(
            f"--cluster: no Ray can be reached at {address} ({told:.200}); start it with `ray start --head`"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--cluster: Ray is not installed: pip install 'qcompile-onnx[cluster]'") from error
    return ray

"""A model compiled and scored under many settings: every combination once, finished ones kept on disk."""

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.facts.model import versions
from qcompile.compiler.files import publish
from qcompile.compiler.files.cache import Cache, digest
from qcompile.compiler.files.load import load_model, model_hash
from qcompile.compiler.files.work import forget
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.plan import build, effective, fitted, packages
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.report import Report
from qcompile.compiler.sweep.grid import Combination, Grid, combinations, identity
from qcompile.compiler.sweep.progress import COMPILING, Compiling, Quiet, Watcher
from qcompile.compiler.sweep.rows import DONE, FAILED, OPEN, REFUSED, SAME, Row, Sweep, name
from qcompile.compiler.sweep.scoring import Evaluation, Scoring, calibration_digest, scoring
from qcompile.compiler.sweep.tables import write_plots, write_tables
from qcompile.compiler.walk.checkpoints import walked
from qcompile.passes.errors import UserError
from qcompile.passes.workers import Here, elsewhere

_KEPT = ("status", "reason", "bits_per_weight", "compiled_bytes", "coverage", "scores", "seconds", "data", "model")


def sweep(
    model: Path | str,
    grid: Grid,
    *,
    output: Path | str,
    recipe: Recipe | None = None,
    calibration: Sequence[str] = (),
    tokenizer: Path | None = None,
    evaluation: Evaluation | None = None,
    limit: int | None = None,
    keep_models: bool = False,
    note: str = "",
    watcher: Watcher | None = None,
) -> Sweep:
    """Compile and score every combination of the grid's values over the recipe; see docs/sweep.md.

    output: a folder for tables, plots and the cache; combinations finished in it before are not run again.
    calibration: files for every combination, unless the grid has its own. limit: run so many at most.
    note: joins the caption. Ctrl-C leaves the tables of what is finished, and raises KeyboardInterrupt.

    Raises UserError for bad input before anything runs. A combination that cannot be compiled is a row with its reason.
    """
    made = combinations(grid, recipe or Recipe(), calibration)
    source, folder = Path(model), Path(output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one for the results with -o")
    plan, hashed = input_plan(load_model(source)), model_hash(source)
    score = scoring(plan, source, hashed, tokenizer, evaluation or Evaluation(), folder)
    result = Sweep(
        model=str(source),
        model_hash=hashed,
        base=(recipe or Recipe()).to_dict(),
        versions=versions(),
        error=score.metric.error,
        axis=score.metric.axis,
        source=score.source,
        note=note,
        rows=[Row(number, combination.values) for number, combination in enumerate(made, 1)],
        float_scores=score.metric.float_scores,
    )
    data = [Calibration(one.calibration, tokenizer, bundled=score.bundled) for one in made]
    for given in {tuple(own.words): own for own in data}.values():
        score.check_apart(plan, given)
    job = _Job(result, made, data, score, tokenizer, folder, watcher or Quiet(), keep_models)
    job.look_up()
    try:
        job.run(limit)
    finally:
        shutil.rmtree(folder / ".walks", ignore_errors=True)
        write_tables(result, folder)
        result.remarks += write_plots(result, folder)
    return result


@dataclass
class _Job:
    """The rows of a sweep on their way from open to done. made, data: the combination of each row, and what it is
    calibrated on. walks: by the number of a row that another one walks alike, a name of their walk, which is made once.
    """

    sweep: Sweep
    made: Sequence[Combination]
    data: Sequence[Calibration]
    scoring: Scoring
    tokenizer: Path | None
    folder: Path
    watcher: Watcher
    keep_models: bool
    walks: dict[int, str] = field(default_factory=dict)

    @property
    def cache(self) -> Cache:
        """Finished combinations."""
        return Cache(self.folder / "cache")

    def look_up(self) -> None:
        """Give every row its key, and what is known of it: impossible settings, an earlier row, figures on disk."""
        first: dict[str, Row] = {}
        for row, made in zip(self.sweep.rows, self.made, strict=True):
            if made.recipe is None:
                row.status, row.reason = REFUSED, made.reason
                continue
            row.key = self._key(made.recipe, self.data[row.number - 1])
            if (same := first.setdefault(row.key, row)) is not row:
                differing = " and ".join(key for key in row.values if row.values[key] != same.values[key])
                told = name(same.values, self.sweep.varying)
                row.status, row.reason = SAME, f"as {told}: {differing} makes no difference there"
            else:
                _fill(row, self.cache.get(row.key) or {})

    def _key(self, recipe: Recipe, data: Calibration) -> str:
        content = calibration_digest(data, self.tokenizer or Path(self.sweep.model))
        return digest(
            {
                "model": self.sweep.model_hash,
                "recipe": identity(recipe, content),
                "scored": self.scoring.identity,
                "versions": self.sweep.versions | packages(recipe),
            }
        )

    def run(self, limit: int | None) -> None:
        """Compile and score the open rows, `limit` of them at most."""
        pending = [row for row in self.sweep.rows if row.status == OPEN]
        chosen = pending[:limit]
        if chosen:
            what = "running the float model"
            self.watcher.share(what, 0.0)
            self.scoring.metric.prepare(lambda done, total: self.watcher.share(f"{what}: {done} of {total}", 0.0))
            self.sweep.float_scores = self.scoring.metric.float_scores
        ended = list[Row]()
        self.walks = self._alike(chosen)
        first = {walk: number for number, walk in reversed(self.walks.items())}
        chosen = sorted(chosen, key=lambda row: first.get(self.walks.get(row.number, ""), row.number))  # one lies there

        def load(row: Row) -> tuple[Row]:
            self.watcher.begin(self.sweep, row, len(ended), len(chosen))
            return (row,)

        workers = elsewhere() or Here()
        for number, figures in workers.each(_Job.figures, chosen, load=load, given=(self,)):
            ended.append(row := chosen[number])
            _fill(row, figures)
            if row.status != FAILED:
                self.cache.put(row.key, {kept: asdict(row)[kept] for kept in _KEPT})
            write_tables(self.sweep, self.folder)
            if (walk := self.walks.pop(row.number, "")) and walk not in self.walks.values():
                shutil.rmtree(self._walk(walk), ignore_errors=True)
            self.watcher.end(self.sweep, row, self._left([one for one in chosen if one not in ended]))
        if len(chosen) == len(pending):
            self.scoring.metric.close()

    def _alike(self, rows: Sequence[Row]) -> dict[int, str]:
        """Names of walks by the numbers of rows, of walks that several rows have; what these read decides once more."""
        found: dict[str, list[int]] = {}
        for row in rows:
            made = self.made[row.number - 1]
            with suppress(UserError):  # told of its row
                recipe = effective(fitted(made.recipe)[0]) if made.recipe is not None else Recipe()
                told = {**walked(recipe.to_dict(), build(recipe)), "data": self.data[row.number - 1].words}
                found.setdefault(digest(told), []).append(row.number)
        return {number: name for name, numbers in found.items() if len(numbers) > 1 for number in numbers}

    def _walk(self, name: str) -> Path:
        """The folder of a walk that several rows have, while they are worked on."""
        return self.folder / ".walks" / name

    def __getstate__(self) -> dict[str, Any]:
        """As another process has it, to which nobody listens."""
        return self.__dict__ | {"watcher": Quiet()}

    def figures(self, row: Row) -> dict[str, Any]:
        """Of one row, by the names of its fields; or the reason why there are none."""
        started = time.monotonic()
        try:
            found = self._figures(row)
        except Exception as error:  # a bug or a full disk in one combination ends no sweep of hours
            passing = not isinstance(error, UserError) or isinstance(error.__cause__, (OSError, MemoryError))
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            found = {"status": FAILED if passing else REFUSED, "reason": " ".join(told.split())}
            if not passing:
                self._forget(row)
        return found | {"seconds": time.monotonic() - started}

    def _kept(self, row: Row) -> Path:
        """Where a row's model is kept, if models are."""
        return self.folder / "models" / row.key / "model.onnx"

    def _forget(self, row: Row) -> None:
        """Remove what a refused compile left to go on from: the row is not compiled again."""
        with suppress(UserError, OSError):
            forget(self._kept(row))
            self._kept(row).parent.rmdir()

    def _figures(self, row: Row) -> dict[str, Any]:
        """Compile and score; the model is removed unless it is to be kept."""
        made = self.made[row.number - 1]
        kept = self._kept(row)
        walk = self.walks.get(row.number)
        with nullcontext(kept) if self.keep_models else publish.staging(self.folder / "model.onnx") as path:
            report: Report = compile_model(
                self.sweep.model,
                made.recipe,
                output=path,
                calibration=self.data[row.number - 1],
                progress=Compiling(self.watcher),
                checkpoints=None if walk is None else self._walk(walk),
            )
            scores = self.scoring.metric.score(path, self._scored)
        return {
            "status": DONE,
            "bits_per_weight": report.bits_per_weight,
            "compiled_bytes": report.compiled_bytes,
            "coverage": report.coverage,
            "scores": scores,
            "data": report.data,
            "model": str(kept.relative_to(self.folder)) if self.keep_models else "",
        }

    def _scored(self, done: int, total: int) -> None:
        self.watcher.share("scoring", COMPILING + (1 - COMPILING) * done / total)

    def _left(self, rows: Sequence[Row]) -> float:
        """Seconds for the rows, each taken to need what finished rows of its passes needed, else what all did."""
        known = [(row.values.get("passes"), row.seconds) for row in self.sweep.done]

        def expected(passes: str | None) -> float:
            times = [seconds for name, seconds in known if name == passes] or [seconds for _, seconds in known]
            return sum(times) / max(len(times), 1)

        return sum(expected(row.values.get("passes")) for row in rows)


def _fill(row: Row, figures: dict[str, Any]) -> None:
    for kept in _KEPT:
        if kept in figures:
            setattr(row, kept, figures[kept])

"""How long products take on a machine, by shape and format: measured there, and read wherever formats are chosen."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.passes.errors import UserError

# What a product whose weight stays as it is has for a format.
FLOAT = "float"
# Raised with every change of what is measured, or how.
VERSION = 2
# What makes a table whole: options that say formats or activations name other products.
AGAIN = "measure them there with `qcompile timings MODEL -o FILE` and the options that this compile has of them"
# Products that are named of those that a table lacks.
_NAMED = 3


@dataclass(frozen=True, order=True)
class Product:
    """What a time is of: x (rows, K) W (K, N). format: as reports write it ("int4 g64 asym"), or FLOAT. activations:
    bits, as a recipe gives them; auto: those that a compile is expected to choose. type: of x, as numpy calls it.
    """

    k: int
    n: int
    format: str
    activations: str = "auto"
    type: str = "float32"

    def __str__(self) -> str:
        of_type = "" if self.type == "float32" else f", {self.type}"
        at = "" if self.activations == "auto" else f", {self.activations}-bit activations"
        return f"{self.k}×{self.n} in {self.format}{at}{of_type}"


@dataclass(frozen=True, repr=False)
class Timings(Shown):
    """Microseconds of products on one machine, for one target. rows: of x. machine: what they were measured on."""

    machine: Mapping[str, str | int]
    target: str
    rows: int
    times: Mapping[Product, float]

    @property
    def told(self) -> str:
        """The machine in words."""
        own = {key: value for key, value in self.machine.items() if key != "library"}
        words = {"onnxruntime": "ONNX Runtime {}", "threads": "{} thread" if own.get("threads") == 1 else "{} threads"}
        return ", ".join(words.get(key, "{}").format(value) for key, value in own.items()) or "an unnamed machine"

    def lacking(self, products: Iterable[Product]) -> list[Product]:
        """Those that it has no time of, in order, each once."""
        return [own for own in dict.fromkeys(products) if own not in self.times]

    def records(self) -> list[dict[str, Any]]:
        """A row for each product."""
        return [{**asdict(own), "microseconds": self.times[own]} for own in sorted(self.times)]

    def sheet(self) -> Sheet:
        """A line for each, beside the product in float."""
        rows = []
        for own in sorted(self.times):
            plain = self.times.get(replace(own, format=FLOAT, activations="auto"))
            ratio = f"{plain / self.times[own]:.2f}×" if plain is not None and own.format != FLOAT else ""
            rows.append([f"{own.k}×{own.n}", own.type, own.format, f"{self.times[own]:.1f}", ratio])
        rows = rows if any(row[1] != "float32" for row in rows) else [[row[0], *row[2:]] for row in rows]
        heads = ["K×N", *(["type"] if rows and len(rows[0]) > 4 else []), "format", "µs", "of float's speed"]
        title = f"{self.rows} {'row' if self.rows == 1 else 'rows'} at a time, target {self.target}: {self.told}"
        return Sheet(title, tuple(heads), rows, 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        own = {"target": self.target, "rows": self.rows, "times": self.records()}
        return {"version": VERSION, "machine": dict(self.machine), **own}

    def to_json(self) -> str:
        """The file that `--for-machine` reads."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, plain: Any) -> "Timings":
        """The timings of plain values; ValueError with what is wrong where they are none."""
        import msgspec  # here: most commands read none

        try:
            read = msgspec.convert(plain, _struct())
        except msgspec.ValidationError as error:
            raise ValueError(str(error)) from error
        if read.version != VERSION:
            raise ValueError(f"it is of version {read.version}, and this one reads {VERSION}")
        if read.rows < 1:
            raise ValueError(f"rows must be at least 1, got {read.rows}")
        times = dict[Product, float]()
        for own in read.times:
            product = Product(own.k, own.n, own.format, own.activations, own.type)
            if not 0 < own.microseconds < math.inf:
                raise ValueError(f"microseconds of {product} must be a positive number, got {own.microseconds}")
            if min(own.k, own.n) < 1:
                raise ValueError(f"k and n must be at least 1, got {product}")
            if product in times:
                raise ValueError(f"{product} is there twice")
            times[product] = own.microseconds
        return cls(read.machine, read.target, read.rows, times)


def check_complete(table: Timings, products: Collection[Product], path: Path | None) -> None:
    """UserError that names what a table lacks; nothing is guessed from other shapes."""
    lacking = table.lacking(products)
    if lacking:
        named = "; ".join(map(str, lacking[:_NAMED])) + ("; …" if len(lacking) > _NAMED else "")
        told = f"--for-machine {path} lacks {len(lacking)} of {len(set(products))} products: {named}"
        raise UserError(f"{told}: {AGAIN}")


def _struct() -> Any:
    """What `from_dict` takes, strictly."""
    import msgspec

    fields: list[Any] = [("k", int), ("n", int), ("format", str), ("microseconds", float)]
    fields += [("activations", Literal["auto", "8", "16"], "auto"), ("type", Literal["float32", "float16"], "float32")]
    own: Any = msgspec.defstruct("Time", fields, forbid_unknown_fields=True)
    fields = [("version", int), ("target", str), ("rows", int), ("times", list[own]), ("machine", dict[str, str | int])]
    return msgspec.defstruct("Timings", fields, forbid_unknown_fields=True)

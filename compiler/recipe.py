"""What to do with a model: an ordered list of passes and the settings around it."""

import contextlib
import math
import re
import reprlib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qcompile.passes import lists
from qcompile.passes.errors import UserError

TARGETS = ("qcompile", "matmulnbits", "qdq")
KEEP_AS = ("auto", "weights", "float")
# Longer files are something else. Seeds and sizes beyond these are typing errors, or attacks.
_LARGEST_FILE, _LARGEST_SEED, _MOST = 1 << 20, 2**63 - 1, 10**7
# How files and options write a setting's None.
_WORDS = {"lm_head": "keep", "embedding": "keep", "activations": "auto", "min_coverage": "auto"}
# Settings that may be a weight format.
_FORMATS = ("weights", "lm_head", "embedding")
# Settings of which each alone says what stays in float; None by default.
_MIXED = ("keep_worst", "max_kl", "min_sqnr")
_ITEM = re.compile(r"\s*([A-Za-z_][\w-]*)\s*(?:\(([^()]*)\))?\s*$")


@dataclass(frozen=True)
class Step:
    """One pass of the list, with the parameters given to it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{key}={_scalar(value)}" for key, value in self.parameters.items())
        return f"{self.name}({given})" if given else self.name


def parse_step(text: str, whole: str = "") -> Step:
    """One name with its parameters, such as "smooth(alpha=auto)". whole: what it was taken from, for a message."""
    match = _ITEM.match(text)
    if match is None:
        raise UserError(f"cannot read {text.strip()!r} in {whole or repr(text)}: expected name or name(key=value, …)")
    pairs = [_pair(part, whole or repr(text)) for part in (match[2] or "").split(",") if part.strip()]
    if len(parameters := dict(pairs)) < len(pairs):
        raise UserError(f"cannot read {text.strip()!r} in {whole or repr(text)}: a parameter is there twice")
    return Step(match[1], parameters)


def parse_passes(text: str) -> tuple[Step, ...]:
    """The steps of a list such as "smooth(alpha=auto),awq,pack(target=qdq)"."""
    return tuple(parse_step(item, f"the pass list {text!r}") for item in split_list(text))


def split_list(text: str) -> list[str]:
    """The items of a list with commas between them, of which some may stand in an item's parentheses."""
    return re.split(r",(?![^(]*\))", text)


def _pair(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise UserError(f"cannot read {text.strip()!r} in {whole}: expected key=value")
    return key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """true or false, an integer, a number (1e-3 too, which YAML takes for a word), or else a word."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_BITS = 4
DEFAULT_PASSES = parse_passes(lists.BEST)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the compiled bytes, beside the model and the calibration data.

    passes: in order; `prepare` runs first whether listed or not. weights: the format of ordinary linears with its
    parameters; None: integers of so many bits and so large groups, group_size 0 being one scale a column. lm_head,
    embedding: a format, bits in such groups, or None to keep float. samples, context: calibration windows and their
    tokens. min_coverage: share of the MatMul-like and of the convolutions' weights that must be
    quantized, each, else compiling fails; None: 95 % of those the list has formats for, and half of all; 0: any.
    min_cosine: of every output to the float model's on the check batches, else compiling fails; 0 for none.
    activations: bits that kernels give the activations of packed products, 8 or 16, or None to choose node by node.
    keep_worst, max_kl, min_sqnr: nodes that qdq or dynamic leave in float: so many of the most sensitive, or as few as
    keep a decoder's KL (nats a token) below a bound, or the SQNR of other models' outputs (dB) above one. One of them.
    keep_as: whether their MatMuls have int8 "weights" all the same, or are "float"; "auto" measures.
    """

    passes: tuple[Step, ...] = DEFAULT_PASSES
    bits: int = _BITS
    group_size: int = 128
    symmetric: bool = False
    weights: Step | None = None
    target: str = "qcompile"
    lm_head: int | Step | None = 8
    embedding: int | Step | None = 8
    activations: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    samples: int = 32
    context: int = 512
    min_coverage: float | None = None
    min_cosine: float = 0.5
    seed: int = 0
    provider: str = "cpu"
    keep_as: str = "auto"
    keep_worst: int | None = None
    max_kl: float | None = None
    min_sqnr: float | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"unknown target {self.target!r}; choose one of {', '.join(TARGETS)}")
        if self.group_size != 0 and not 8 <= self.group_size <= 4096:
            raise UserError(
                f"group size {self.group_size} is not possible; give 8 to 4096, or 0 for one scale a column"
            )
        if self.keep_as not in KEEP_AS:
            raise UserError(f"keep_as takes {' or '.join(KEEP_AS)}, got {self.keep_as!r}")
        if self.bits not in (4, 8):
            raise UserError(f"weights are quantized to 4 or 8 bits, got {self.bits}")
        for name, bits in (("lm_head", self.lm_head), ("embedding", self.embedding)):
            if bits not in (4, 8, None) and not isinstance(bits, Step):
                raise UserError(f"{name} takes 4, 8, a weight format or keep, got {bits}")
        self._check_formats()
        if self.activations not in (8, 16, None):
            raise UserError(f"activations takes 8, 16 or auto, got {self.activations}")
        if self.activations == 8 and self.target != "qcompile":
            raise UserError(f"activations 8 needs target qcompile: the operators of {self.target} do not take it")
        if self.min_coverage is not None and not 0 <= self.min_coverage <= 1:
            raise UserError(f"min_coverage must lie between 0 and 1, got {self.min_coverage}")
        if not 0 <= self.min_cosine <= 1:
            raise UserError(f"min_cosine must lie between 0 and 1, got {self.min_cosine}")
        if self.samples < 1 or self.context < 2:
            raise UserError(f"samples must be at least 1 and context at least 2, got {self.samples} and {self.context}")
        if max(self.samples, self.context) > _MOST:
            raise UserError(f"samples and context must be at most {_MOST}, got {self.samples} and {self.context}")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise UserError(f"seed must be 0 to {_LARGEST_SEED}, got {self.seed}")
        self._check_mixed()

    @property
    def mixed(self) -> str:
        """The setting by which nodes are to be kept in float for their sensitivity; empty where none are."""
        return next((name for name in _MIXED if getattr(self, name) is not None), "")

    @property
    def formats(self) -> dict[str, Step]:
        """By setting, the weight formats that are given by name."""
        own = {name: getattr(self, name) for name in _FORMATS}
        return {name: value for name, value in own.items() if isinstance(value, Step)}

    def _check_formats(self) -> None:
        if self.weights is not None and (self.bits != _BITS or self.symmetric):
            raise UserError(f"weights: {self.weights} says all of bits and symmetric: leave these out")

    def _check_mixed(self) -> None:
        given = [name for name in _MIXED if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are two ways to choose what stays in float: give one")
        if self.keep_worst is not None and self.keep_worst < 1:
            raise UserError(f"keep_worst must be at least 1, got {self.keep_worst}")
        for name, value in (("max_kl", self.max_kl), ("min_sqnr", self.min_sqnr)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them."""
        plain = asdict(self)
        plain["passes"] = [str(step) for step in self.passes]
        plain["include"], plain["exclude"] = list(self.include), list(self.exclude)
        for name in _FORMATS:
            value = getattr(self, name)
            plain[name] = str(value) if isinstance(value, Step) else value
        for name, word in _WORDS.items():
            plain[name] = word if plain[name] is None else plain[name]
        left = {name for name in (*_MIXED, "weights") if plain[name] is None}
        left |= set() if self.mixed else {"keep_as"}
        return {name: value for name, value in plain.items() if name not in left}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """The recipe of plain values; an unknown key or a value of the wrong type is an error."""
        known = {f.name: f for f in fields(cls)}
        for key in plain:
            if key not in known:
                raise UserError(f"{source}: unknown key {_shown(key)}; known keys are {', '.join(known)}")
        return cls(**{key: _converted(key, value, source) for key, value in plain.items()})


class _Loader(yaml.SafeLoader):
    """YAML without aliases, of which a recipe needs none: a few lines of them stand for more than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, unless it is an alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read here: write the value out",
                problem_mark=mark)  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table, of which no key is there twice: one of the two would be dropped without a word."""
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            keys = [key.value for key, _ in node.value]
            again = next(key for key, _ in node.value if keys.count(key.value) > 1)
            raise yaml.MarkedYAMLError(problem=f"key {again.value!r} is there twice", problem_mark=again.start_mark)
        return made


def _shown(value: Any) -> str:
    """A value of a file for a message, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def load_recipe(path: Path) -> Recipe:
    """The recipe in a .yaml, .yml or .toml file."""
    if path.exists() and not path.is_file():  # reading a pipe may wait for ever
        raise UserError(f"recipe {path} is not a regular file")
    try:
        if path.exists() and path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"recipe {path} has over {_LARGEST_FILE} bytes: that is no recipe")
        text = path.read_text(encoding="utf-8")
        plain = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Loader)
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"recipe {path} is nested too deeply: it must be a table of keys and values") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: bad UTF-8, TOML, dates, endless numbers
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())[:400]}") from error
    if not isinstance(plain, dict):
        raise UserError(f"recipe {path} must be a table of keys and values, such as 'bits: 4'")
    return Recipe.from_dict(plain, str(path))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, ready for `--recipe`."""
    path.write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    return str(yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _converted(key: str, value: Any, source: str) -> Any:
    expected: dict[str, tuple[type, ...]] = {
        "bits": (int,), "group_size": (int,), "symmetric": (bool,), "target": (str,), "samples": (int,),
        "context": (int,), "keep_as": (str,), "min_coverage": (int, float), "seed": (int,), "provider": (str,),
        "min_cosine": (int, float),
        "weights": (str,), "keep_worst": (int,), "max_kl": (int, float), "min_sqnr": (int, float),
    }  # fmt: skip
    if key == "passes":
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise UserError(f"{source}: passes must be a list of names, got {_shown(value)}")
        return parse_passes(",".join(items))
    if key in ("include", "exclude"):
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{source}: {key} must be a list of patterns, got {_shown(value)}")
        return tuple(items)
    if key in _WORDS:
        if value in (_WORDS[key], None):
            return None
        expected.setdefault(key, (int,))
    if key in _FORMATS and isinstance(value, str):
        return parse_step(value, f"{source}: {key}")
    if key in (*_MIXED, "weights") and value is None:
        return None
    if not isinstance(value, expected[key]) or (isinstance(value, bool) and bool not in expected[key]):
        kinds = " or ".join(kind.__name__ for kind in expected[key])
        raise UserError(f"{source}: {key} must be {kinds}, got {_shown(value)}")
    return value

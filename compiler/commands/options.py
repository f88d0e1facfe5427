"""Options: a command declares them as fields of a dataclass, which cyclopts reads; those that several commands have.

    @command(WHAT, WHICH)
    class Options(Common):
        \"\"\"Quantize the weights of an ONNX model.\"\"\"

        model: Annotated[Path, positional("MODEL.onnx", "the float model")]
        output: Annotated[Path | None, option("the compiled model", "FILE", alias="-o")] = None

A field's type says what its values are, the docstring what the command is for. `@command` adds the options of those
settings of a recipe that are declared under the headings named (compiler/recipe.py): None where they are not given.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform, get_type_hints

from cyclopts import Group, Parameter, Token

from qcompile.compiler.recipe import DATA, MIXED, SAFETY, SETTINGS, WHAT, WHICH, Recipe, Step, load_recipe
from qcompile.compiler.settings.setting import Setting
from qcompile.passes import lists

T = TypeVar("T")
# What a command found, for --json; None where there is nothing to tell.
Document = dict[str, Any] | list[Any] | None
LogLevel = Literal["debug", "info", "warning", "error"]
Kernels = Literal["auto", "native", "portable"]
# Headings of a command's help that stand in this order; others stand between them and the last.
COMMON = "every command"
_GROUPS = {name: Group(name, sort_key=order) for order, name in enumerate((WHAT, WHICH, DATA, MIXED, SAFETY), 2)}
_FIRST, _LAST = 1, 99


def group(name: str) -> Group:
    """The heading of that name in a command's help."""
    return _GROUPS.get(name) or Group(name, sort_key=_LAST if name == COMMON else _FIRST)


def option(
    told: str, metavar: str | None = None, *, under: str = "options", many: bool = False, **more: Any
) -> Parameter:
    """What the type of an option does not say. under: its heading. many: it takes several words, and may repeat.

    more: as `cyclopts.Parameter` takes it: `name`, `alias`, `converter`, …
    """
    words: dict[str, Any] = {"consume_multiple": (1, 1 << 20)} if many else {}
    return Parameter(help=told, metavar=metavar, group=group(under), **words, **more)


@dataclass(frozen=True)
class positional:
    """An argument that is known by its place; several, where the field is a tuple."""

    metavar: str
    told: str

    @property
    def parameter(self) -> Parameter:
        """The same for cyclopts."""
        return Parameter(name=self.metavar, help=self.told, group=Group("arguments", sort_key=0))


def _numbers(_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    """0.5, or 0.4,0.5,0.6."""
    text = tokens[0].value
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"expected numbers such as 0.5 or 0.4,0.5,0.6, got {text!r}") from error


def _positive(_: Any, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"must be at least 1, got {value}")


def _size(_: Any, tokens: Sequence[Token]) -> tuple[int, int]:
    """224,224, or 224x224."""
    text = tokens[0].value
    try:
        height, width = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise ValueError(f"expected height,width such as 224,224, got {text!r}") from error
    return height, width


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How much a command says. epilog: what stands below the options in its help. given: names of what was given."""

    epilog: ClassVar[str] = ""
    given: frozenset[str] = field(default=frozenset(), init=False, compare=False)

    quiet: Annotated[
        bool,
        option("no progress, no reports: nothing but errors, and what was asked for", alias="-q", under=COMMON),
    ] = False
    verbose: Annotated[int, option("say more on stderr (-vv: everything)", alias="-v", count=True, under=COMMON)] = 0
    log_level: Annotated[
        LogLevel | None, option("how much the log says on stderr, instead of -v", "LEVEL", under=COMMON)
    ] = None
    traceback: Annotated[bool, option("show the Python traceback of an error", under=COMMON)] = False


@dataclass(frozen=True, kw_only=True)
class Threads(Talk):
    """--threads."""

    threads: Annotated[
        int | None,
        option("at most so many threads (default: every core)", "N", under=COMMON, validator=_positive),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Common(Threads):
    """What every command takes."""

    json: Annotated[bool, option("one JSON document on stdout, and nothing else there", under=COMMON)] = False


@dataclass(frozen=True, kw_only=True)
class JsonFile:
    """--json [FILE], of commands whose results are kept."""

    json: Annotated[
        list[Path] | None,
        option(
            "one JSON document on stdout, and nothing else there; with FILE: written there, beside the tables",
            "[FILE]",
            under=COMMON,
            consume_multiple=(0, 1),
        ),
    ] = None

    @property
    def json_file(self) -> Path | None:
        """The file, if there is to be one."""
        return self.json[0] if self.json else None


@dataclass(frozen=True, kw_only=True)
class CustomOps:
    """--custom-ops; the command line has its libraries registered around the whole command."""

    custom_ops: Annotated[
        tuple[Path, ...],
        option(
            "a library of custom operators that the model needs (a .so, .dylib or .dll: its code runs); may repeat",
            "FILE",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """--cluster; the command line has Ray's machines compute around the whole command."""

    cluster: Annotated[
        str | None,
        option(
            "have Ray's machines compute: auto, those of the cluster that this machine is in (else its own cores), or "
            "HOST:PORT of another; needs the extra cluster (docs/cluster.md)",
            "auto|ADDRESS",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Kernelled:
    """--kernels: who computes the operators of qcompile."""

    kernels: Annotated[
        Kernels,
        option(
            "who computes the operators of qcompile: native, its library (on cuda unverified on GPU); portable, ONNX "
            "Runtime through their ONNX bodies; auto (default), the library where there is one and the provider is the "
            "CPU",
            "{auto,native,portable}",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class Runs(Kernelled):
    """How models are run to be judged, or to write."""

    accuracy_level: Annotated[
        Literal[0, 1, 2, 3, 4],
        option(
            "what ONNX Runtime may do in 4-bit products: 0 exact (default), 4 int8 activations (its own default)",
            "{0,1,2,3,4}",
        ),
    ] = 0
    provider: Annotated[str, option("cpu (default) or cuda", "NAME")] = "cpu"


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """--recipe: what the options of settings stand before."""

    recipe: Annotated[
        Path | None, option("settings from a YAML or TOML file; options given here win", "FILE", under=WHAT)
    ] = None


@dataclass(frozen=True, kw_only=True)
class Calibrating(CustomOps):
    """Where calibration data comes from."""

    calibration: Annotated[
        list[str],
        option(
            "text, .jsonl, .npz, .npy or image files, folders of them, or module:name (a function that gives dicts of "
            "arrays, or a reader with get_next); general (the bundled text; beside files of text, half of the "
            "windows); or one word: self (tokens that the model generates, and random ones), norms (no data: the "
            "scales of norms stand in for activations); may repeat. Default: general, else self",
            "FILE…",
            under=DATA,
            many=True,
        ),
    ] = field(default_factory=list)
    image_mean: Annotated[
        tuple[float, ...] | None,
        option(
            "of images: (pixel/255 - mean) / std; one number, or one a channel (default: of preprocessor_config.json "
            "beside the model, else ImageNet's)",
            "R,G,B",
            under=DATA,
            converter=_numbers,
            n_tokens=1,
        ),
    ] = None
    image_std: Annotated[
        tuple[float, ...] | None,
        option("deviations, likewise", "R,G,B", under=DATA, converter=_numbers, n_tokens=1),
    ] = None
    image_size: Annotated[
        tuple[int, int] | None,
        option("of images, where the model's input leaves it free", "H,W", under=DATA, converter=_size, n_tokens=1),
    ] = None
    tokenizer: Annotated[
        Path | None, option("folder with tokenizer.json (default: beside the model)", "DIR", under=DATA)
    ] = None


def changed(args: T, **new: Any) -> T:
    """The options with other values; what was given stays what was given."""
    made: Any = replace(args, **new)  # type: ignore[type-var]
    object.__setattr__(made, "given", getattr(args, "given", frozenset()))
    return made  # type: ignore[no-any-return]


def recipe_of(args: Any) -> Recipe:
    """The recipe file's settings, overridden by the options given."""
    plain = (load_recipe(args.recipe) if args.recipe else Recipe()).to_dict()
    return Recipe.from_dict(plain | settings_of(args), "options")


def settings_of(args: Any) -> dict[str, Any]:
    """Plain values of a recipe's settings, of those that were given as options."""
    given = {name: getattr(args, name, None) for name in SETTINGS}
    return {name: value for name, value in given.items() if value is not None}


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def command(*headings: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass of declared options, with those of a recipe's settings under `headings`, for cyclopts."""

    def made(declared: type[T]) -> type[T]:
        own = dataclass(frozen=True, kw_only=True)(declared)
        taken = get_type_hints(own)
        added: list[tuple[str, Any, Any]] = [
            (name, _annotation(setting), None)
            for name, setting in SETTINGS.items()
            if setting.about.group in headings and name not in taken
        ]
        kind: Any = make_dataclass(declared.__name__, added, bases=(own,), frozen=True, kw_only=True)
        kind.__module__, kind.__doc__ = declared.__module__, declared.__doc__
        kind.__signature__ = _signature(kind, {name for name, _, _ in added})
        return kind  # type: ignore[no-any-return]

    return made


def _signature(kind: Any, settings: set[str]) -> inspect.Signature:
    """As cyclopts reads it: settings before other options under the same heading, and arguments by their places."""
    hints, placed, named = get_type_hints(kind, include_extras=True), [], []
    given = inspect.signature(kind.__init__).parameters
    own = kind.__mro__[1].__annotations__
    for name in sorted(list(given)[1:], key=lambda name: 0 if name in settings else 1 if name in own else 2):
        marks, taken = getattr(hints[name], "__metadata__", ()), given[name]
        place = next((mark for mark in marks if isinstance(mark, positional)), None)
        if place is None:
            named.append(taken.replace(annotation=hints[name]))
        else:
            hint = _annotated(hints[name].__origin__, place.parameter)
            kind.__annotations__[name] = hint
            placed.append(taken.replace(kind=inspect.Parameter.POSITIONAL_ONLY, annotation=hint))
    return inspect.Signature([*placed, *named])


def _annotation(own: Setting) -> Any:
    """The option of a setting; what it gives is what a file holds."""
    told = own.told(formats=", ".join(lists.FORMATS))
    about, under = own.about, own.about.group
    if about.opposite is not None:
        other, otherwise = about.opposite
        return Annotated[bool | None, option(f"{told}; {other}: {otherwise}", under=under, negative=other)]
    if own.kinds == (bool,):
        return Annotated[bool | None, option(told, under=under)]
    if own.many and Step not in own.kinds:
        return Annotated[list[str] | None, option(told, about.metavar, under=under)]
    if own.kinds == (str,) and own.choices:
        return Annotated[_one_of(own.choices), option(told, f"{{{','.join(own.choices)}}}", under=under)]
    metavar = about.metavar or f"{{{','.join(own.values)}}}"
    if about.word or Step in own.kinds:
        taken = option(told, metavar, under=under, converter=_converter(own), n_tokens=1)
        return Annotated[_completed(own), taken]
    return Annotated[own.kinds[0] | None, option(told, metavar, under=under)]


def _completed(own: Setting) -> Any:
    """What shells complete of a value that its own converter reads: its words, and the formats; passes are a list.

    Numbers are of the type, too: where the process has pydantic (Ray brings it), cyclopts has it check what is read.
    """
    formats = lists.FORMATS if Step in own.kinds and not own.many else ()
    words = (*(word for word in own.values if word != "FORMAT"), *formats)
    return Literal[words] | str | float | None if words and not own.many else Any


def _one_of(choices: tuple[Any, ...]) -> Any:
    return Literal[choices] | None


def _annotated(kind: Any, parameter: Parameter) -> Any:
    return Annotated[kind, parameter]


def _converter(own: Setting) -> Callable[[Any, Sequence[Token]], Any]:
    """What makes a file's plain value of an option's text, where some values have names."""

    def converted(_: Any, tokens: Sequence[Token]) -> Any:
        text = tokens[0].value
        if (
            own.many
            or own.kinds[0] in (str, Step)
            or text == own.about.word
            or (Step in own.kinds and text[:1].isalpha())
        ):
            return text
        by_name = {str(choice): choice for choice in own.choices}
        try:
            return by_name[text] if by_name else own.kinds[0](text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"expected {own.takes}, got {text!r}") from error

    return converted

"""From a recipe to pass objects: which passes there are, their parameters, and how they depend on each other."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qcompile.compiler.recipe import Recipe, Step
from qcompile.passes.affine import Grid
from qcompile.passes.awq import Awq
from qcompile.passes.base import Pass
from qcompile.passes.bias_correction import BiasCorrection
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import OneOf, Table
from qcompile.passes.formats import BY_NAME, named
from qcompile.passes.fuse import Fuse
from qcompile.passes.gptq import ErrorCompensated, Gptq
from qcompile.passes.outlier import Outlier
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.qdq.dynamic import Dynamic
from qcompile.passes.qdq.qdq import Qdq, activation_spec
from qcompile.passes.qdq.weights import SPEC
from qcompile.passes.rounding import Rounding, round_to_nearest, round_with_clip
from qcompile.passes.smooth import Smooth
from qcompile.passes.spec import ActivationSpec


def _check(kind: type[Pass]) -> None:
    """Raise ValueError for a pass of another package that a recipe could not name."""
    for name, parameter in parameters(kind).items():
        if parameter.default is parameter.empty or parameter.annotation is parameter.empty:
            raise ValueError(f"its parameter {name} needs a type and a default")


# Every pass, in the order in which a full list runs them, and those of other packages.
PASSES: Table[type[Pass]] = Table(
    "qcompile.passes",
    "pass",
    Pass,
    (Prepare, Smooth, Awq, Gptq, Pack, Fuse, Outlier, Qdq, Dynamic, BiasCorrection),
    check=_check,
)

# Passes that make weights and activations int8.
INT8 = ("qdq", "dynamic")


def build(recipe: Recipe) -> list[Pass]:
    """The passes of a recipe, `prepare` first; UserError for an unknown pass or parameter, or an impossible order."""
    steps = list(recipe.passes)
    if not any(step.name == "prepare" for step in steps):
        steps.insert(0, Step("prepare"))
    check_order(steps)
    policy = make_policy(recipe)
    return [_make(step, steps[i + 1 :], recipe, policy) for i, step in enumerate(steps)]


def effective(recipe: Recipe) -> Recipe:
    """The recipe with a target that its pack step names: pack(target=qdq) is --target qdq."""
    for step in recipe.passes:
        if step.name == "pack" and step.parameters.get("target") is not None:
            return replace(recipe, target=str(step.parameters["target"]))
    return recipe


def check_order(steps: Sequence[Step]) -> None:
    """Raise UserError for an unknown pass, a repeated one, or one whose neighbours are missing."""
    names = [step.name for step in steps]
    for i, name in enumerate(names):
        PASSES.required(name)
        if name in names[:i]:
            raise UserError(f"pass {name!r} is listed twice")
        after = PASSES[name].followed_by
        if after and not any(later in after for later in names[i + 1 :]):
            raise UserError(f"pass {name!r} must be followed by {' or '.join(after)}: add it to --passes behind {name}")
        before = PASSES[name].preceded_by
        if before and not any(earlier in before for earlier in names[:i]):
            raise UserError(f"pass {name!r} must stand behind {' or '.join(before)}: add it to --passes before {name}")
        for earlier in names[:i]:
            if PASSES[earlier].quantizes and not PASSES[name].after_walk:
                told = f"stands behind {earlier!r}, where no float weights are left: move it before {earlier}"
                raise UserError(f"pass {name!r} {told}")
            if PASSES[earlier].quantizes and PASSES[name].quantizes:
                raise UserError(f"passes {earlier!r} and {name!r} both quantize the weights: choose one")
    if names.index("prepare") != 0:
        raise UserError("pass 'prepare' must come first")


def make_policy(recipe: Recipe) -> Policy:
    """Specs of every kind of weight; `Policy` gives them the scale type of each.

    8-bit weights are unsigned with zero points whatever `symmetric` says (formats/integers.py).
    """
    if any(step.name in INT8 for step in recipe.passes):
        head, table = SPEC if recipe.lm_head else None, SPEC if recipe.embedding else None
        return Policy(SPEC, head, table, recipe.include, recipe.exclude)
    body = grid(recipe.weights or _short(recipe.bits, recipe), recipe.target)

    def vocabulary(wanted: int | Step | None) -> Grid | None:
        step = _short(wanted, replace(recipe, symmetric=False)) if isinstance(wanted, int) else wanted
        return grid(step, recipe.target) if step else None

    return Policy(body, vocabulary(recipe.lm_head), vocabulary(recipe.embedding), recipe.include, recipe.exclude)


def _short(bits: int, recipe: Recipe) -> Step:
    """The weight format that the settings `bits`, `group_size` and `symmetric` stand for."""
    name, given = f"int{bits}", {"group": recipe.group_size, "symmetric": recipe.symmetric}
    return Step(name, {key: value for key, value in given.items() if key in parameters(named(name).grid)})


def grid(step: Step, target: str) -> Grid:
    """The grid of a weight format with its parameters; UserError for an unknown one."""
    own = named(step.name)
    _check_parameters(f"weight format {step.name!r}", step, parameters(own.grid))
    return own.grid(target, **step.parameters)


def packages(recipe: Recipe) -> dict[str, str]:
    """Versions of the packages whose passes, observers or formats a recipe names."""
    named: list[tuple[Table[Any], str]] = [(PASSES, step.name) for step in recipe.passes]
    formats = (recipe.weights, recipe.lm_head, recipe.embedding)
    named += [(BY_NAME, step.name) for step in formats if isinstance(step, Step)]
    for step in recipe.passes:
        known = parameters(PASSES.required(step.name))
        given = {key: _one_of(known[key].annotation) for key in step.parameters if key in known}
        named += [(own.table, str(step.parameters[key])) for key, own in given.items() if own is not None]
    found = (table.origin(name) for table, name in named)
    return {own.package: own.version for own in found if own is not None}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a pass (its constructor) or of a format (its grid) that a recipe can set."""
    made = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    found = inspect.signature(made, eval_str=True).parameters.values()
    return {parameter.name: parameter for parameter in found if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def summary(kind: type) -> str:
    """What a pass, an observer or a weight format is, in a line."""
    return (inspect.getdoc(kind) or "").split("\n", 1)[0]


def _make(step: Step, later: Sequence[Step], recipe: Recipe, policy: Policy) -> Pass:
    kind = PASSES[step.name]
    known = parameters(kind)
    _check_parameters(f"pass {step.name!r}", step, known)
    given: dict[str, Any] = dict(step.parameters)
    if "seed" in known:
        given.setdefault("seed", recipe.seed)
    positional = inspect.signature(kind.__init__).parameters
    if "policy" not in positional:
        return kind(**given)
    if "activations" in positional and positional["activations"].kind is not inspect.Parameter.KEYWORD_ONLY:
        return kind(policy, following_rounding(later), following_grid(later), **given)  # type: ignore[call-arg]
    if "rounding" in positional:
        return kind(policy, following_rounding(later), **given)  # type: ignore[call-arg]
    return kind(policy, **given)  # type: ignore[call-arg]


def following_rounding(later: Sequence[Step]) -> Rounding:
    """The rounding that candidates are judged by: that of `gptq` if it comes later, without its slow refinements."""
    for step in later:
        if step.name == "gptq":
            damping = step.parameters.get("damping", "auto")
            return ErrorCompensated(None if damping == "auto" else float(damping), sweeps=0, refit=False)
        if step.name in INT8:
            return round_to_nearest
    return round_with_clip


def following_grid(later: Sequence[Step]) -> ActivationSpec | None:
    """The grid that activations will be rounded to, if a pass that comes later does that."""
    for step in later:
        if step.name == "qdq":
            chosen = {key: step.parameters[key] for key in ("activations", "symmetric") if key in step.parameters}
            defaults = {"activations": "auto", "symmetric": "auto"}
            return activation_spec(str(step.parameters.get("provider", "cpu")), **(defaults | chosen))
        if step.name == "dynamic":
            return ActivationSpec()
    return None


def _check_parameters(owner: str, step: Step, known: Mapping[str, inspect.Parameter]) -> None:
    for key, value in step.parameters.items():
        if key not in known:
            raise UserError(f"{owner} has no parameter {key!r}; it has {', '.join(known) or 'none'}")
        _check_type(owner, known[key], value)


def _check_type(owner: str, parameter: inspect.Parameter, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{owner}: parameter {parameter.name} takes no {value}")
    if parameter.name == "seed" and isinstance(value, int) and not 0 <= value < 2**63:
        raise UserError(f"{owner}: parameter seed must be 0 to {2**63 - 1}, got {value}")
    annotation = parameter.annotation
    one_of = _one_of(annotation)
    if one_of is not None:
        if one_of.takes(value):
            return
        wanted = " or ".join(map(repr, one_of.names()))
        raise UserError(f"{owner}: parameter {parameter.name} takes {wanted}, got {value!r}")
    alone = typing.get_origin(annotation) is typing.Literal
    allowed = (annotation,) if alone else typing.get_args(annotation) or (annotation,)
    for kind in allowed:
        if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
            return
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return
        if isinstance(kind, type) and type(value) is kind:
            return
    wanted = " or ".join(_told(kind) for kind in allowed if kind is not type(None))
    raise UserError(f"{owner}: parameter {parameter.name} takes {wanted}, got {value!r}")


def _one_of(annotation: Any) -> OneOf[Any] | None:
    marks = annotation.__metadata__ if typing.get_origin(annotation) is typing.Annotated else ()
    return next((mark for mark in marks if isinstance(mark, OneOf)), None)


def _told(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return str(kind.__name__)


def describe(parameters_of: Mapping[str, inspect.Parameter]) -> str:
    """Parameters with their defaults, as a pass list would give them."""
    return ", ".join(f"{name}={parameter.default}" for name, parameter in parameters_of.items())

"""From a recipe to pass objects: which passes there are, their parameters, and how they depend on each other."""

import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from qcompile.compiler.recipe import KEEP, SETTINGS, Recipe, Step
from qcompile.compiler.settings.bound import NO_BOUND, Bound
from qcompile.passes import lists
from qcompile.passes.affine import Grid
from qcompile.passes.base import Pass
from qcompile.passes.contract import PENDING, Fact, Reads, Stage
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import OneOf, Table, parameters
from qcompile.passes.formats import BY_NAME, named
from qcompile.passes.formats.functions import is_product
from qcompile.passes.near import near
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.weights import SPEC
from qcompile.passes.rounding import Rounding, round_with_clip
from qcompile.passes.spec import ActivationSpec, QuantSpec
from qcompile.passes.table import PASSES
from qcompile.passes.targets import TARGETS, Target

# A setting, the value that it gets, and why.
_Change = tuple[str, Any, str]


@dataclass(frozen=True)
class Planned:
    """What a recipe comes to: its passes, those first that always run, and which weight gets which grid."""

    passes: Sequence[Pass]
    policy: Policy

    def ensures(self, fact: Fact) -> bool:
        """Whether a pass makes it true."""
        return any(fact in made.ensures for made in self.passes)


def build(recipe: Recipe) -> list[Pass]:
    """The passes of a recipe; UserError as in `planned`."""
    return list(planned(recipe).passes)


def planned(recipe: Recipe, held: Set[Fact] = frozenset()) -> Planned:
    """What a recipe comes to for a file of which the facts `held` are true (`facts_of`).

    UserError for an unknown pass or parameter, or an impossible order.
    Invariant: whatever list is accepted, what a pass needs holds of the file or is ensured by one before it, and is
    taken by none in between; what it leaves for others is taken by one behind it.
    """
    steps = list(recipe.passes)
    steps[:0] = [Step(name) for name in always() if name not in {step.name for step in steps}]
    for step in steps:
        _check_parameters(f"pass {step.name!r}", step, parameters(PASSES.required(step.name)))
    steps = with_added(steps, recipe)
    check_order(steps, held)
    check_settings(recipe, held)
    policy = make_policy(recipe)
    made: list[Pass] = []
    for step in reversed(steps):
        made.insert(0, _make(step, made, recipe, policy))
    return Planned(made, policy)


def always() -> list[str]:
    """The passes that run whether listed or not: those that bring a file's graph into the form that all others need."""
    return [kind.name for kind in PASSES.own() if Fact.CANONICAL in kind.ensures]


def added(recipe: Recipe, application: str = "") -> list[str]:
    """The passes that a setting of the recipe adds behind its list (`Pass.added`), for one application alone or any."""
    return [
        kind.name
        for kind in PASSES.own()
        if (own := kind.added) is not None
        and getattr(recipe, own.setting) in ({own.value, "auto"} if application in own.alone else {own.value})
        and effective(recipe).target in own.targets
        and steps_that(recipe, ensure=own.behind)
    ]


def for_application(recipe: Recipe, application: str) -> Recipe:
    """The recipe of a model that one application alone is to run, with what it adds written out as that one needs it
    (`Added.applications`).
    """
    return replace(recipe, passes=tuple(with_added(recipe.passes, recipe, application)))


def with_added(steps: Sequence[Step], recipe: Recipe, application: str = "") -> list[Step]:
    """The steps and those that are `added`, each at the end, but before the first that needs or prefers what it
    ensures, or that is such a pass itself and stands behind it in the table.
    """
    made, order = list(steps), [kind.name for kind in PASSES.own() if kind.added is not None]
    for name in reversed(added(recipe, application)):
        own, ensured, later = PASSES[name].added, PASSES[name].ensures, order[order.index(name) + 1 :]
        if own is None or any(
            step.name == name or ensured & PASSES[step.name].ensures - {own.behind} for step in steps
        ):
            continue
        first = 1 + max((i for i, step in enumerate(made) if own.behind in PASSES[step.name].ensures), default=-1)
        behind = (
            i
            for i, step in enumerate(made[first:], first)
            if step.name in later or (PASSES[step.name].needs | PASSES[step.name].prefers) & ensured
        )
        given = {**own.parameters, **own.applications.get(application, {})}
        made.insert(next(behind, len(made)), Step(name, given))
    return made


def steps_that(recipe: Recipe, *, ensure: Fact | None = None, read: Reads | None = None) -> list[Step]:
    """The steps of a recipe whose passes make a fact true, or read this of the calibration data."""
    kinds = {step.name: PASSES.required(step.name) for step in recipe.passes}
    own = {name for name, kind in kinds.items() if ensure in kind.ensures or read in kind.reads}
    return [step for step in recipe.passes if step.name in own]


def bound_of(recipe: Recipe) -> Bound:
    """What the formats of packed weights are to keep; none where passes make nodes integer, of which some keep it."""
    packed = steps_that(recipe, ensure=Fact.PACKED) and not steps_that(recipe, ensure=Fact.INTEGER)
    return Bound(recipe.max_kl, recipe.min_sqnr) if packed else NO_BOUND


def is_spent(recipe: Recipe) -> bool:
    """Whether formats are to be chosen, by a budget or a bound."""
    return recipe.budget is not None or bool(bound_of(recipe))


def ensuring(fact: Fact) -> str:
    """All passes that make a fact true, in words."""
    return _words(kind for kind in PASSES.usable() if fact in kind.ensures)


def taking(fact: Fact) -> str:
    """Those that end it."""
    return _words(kind for kind in PASSES.usable() if fact in kind.takes)


def reading(what: Reads) -> str:
    """Those that read this of the calibration data."""
    return _words(kind for kind in PASSES.usable() if what in kind.reads)


def _words(kinds: Iterable[type[Pass]]) -> str:
    return " or ".join(kind.name for kind in kinds)


def effective(recipe: Recipe) -> Recipe:
    """The recipe as its target takes it, which a step may name: pack(target=qdq) is --target qdq (`fitted`)."""
    return fitted(recipe)[0]


def fitted(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as its target takes it, and what was changed, in words; UserError for what was given and does not fit.

    A setting of its default's value counts as not given. Fitted once more, nothing changes.

    Case 1: a step says whose target it is: pack(target=qdq), or a provider that has one, qdq(provider=tensorrt).
    Case 2: passes that write for a provider get the target's; those whose operators the runtime has not are refused.
    Case 3: packed weights, lm_head among them, get its bits, groups and zero points.
    Case 4: tables of lookups stay in float where it decodes none.
    """
    recipe = _with_target_of_steps(recipe)
    own = TARGETS[recipe.target]
    if not own.runtime:
        return recipe, ()
    recipe = replace(recipe, passes=tuple(_for_target(step, recipe.target, own) for step in recipe.passes))
    packs = any(Fact.PACKED in PASSES.required(step.name).ensures for step in recipe.passes)
    changes = [*_fitted_body(recipe, own), *_fitted_head(recipe, own), *_fitted_named(recipe, own)] if packs else []
    changes += _fitted_lookups(recipe, own)
    told = tuple(f"{name} {SETTINGS[name].plain(value)}: {own.runtime} {why}" for name, value, why in changes)
    values: dict[str, Any] = {name: value for name, value, _ in changes}
    return replace(recipe, **values), told


def _with_target_of_steps(recipe: Recipe) -> Recipe:
    """Case 1."""
    for step in recipe.passes:
        target: Any = step.parameters.get("target") if Fact.PACKED in PASSES.required(step.name).ensures else None
        if target is not None:
            return replace(recipe, target=target)
        provider = step.parameters.get("provider")
        meant: Any = next((name for name, own in TARGETS.items() if provider and own.provider == provider), None)
        if meant is not None and not TARGETS[recipe.target].runtime:
            return replace(recipe, target=meant)
    return recipe


def _for_target(step: Step, target: str, own: Target) -> Step:
    """Case 2."""
    kind = PASSES.required(step.name)
    if reason := kind.unserved.get(target):
        raise UserError(f"pass {step.name} does not go with target {target}: {own.runtime} {reason}")
    if "provider" not in parameters(kind):
        return step
    given = step.parameters.get("provider", own.provider)
    if given != own.provider:
        raise UserError(f"target {target} is for provider {own.provider}, {step.name} says {given}: leave one out")
    return replace(step, parameters={**step.parameters, "provider": given})


def _fitted_body(recipe: Recipe, own: Target) -> Iterator[_Change]:
    """Case 3: of ordinary weights."""
    if recipe.weights is not None:
        yield from _fitted_format(recipe, "weights", recipe.weights, own)
        return
    if recipe.bits not in own.bits:
        advice = f"leave out bits, or choose integer products, --passes {lists.INTEGER}"
        raise _unfitting(recipe, f"weights of {_numbers(own.bits)} bits, got {recipe.bits}", advice)
    if own.groups and recipe.group_size not in own.groups:
        if recipe.group_size != SETTINGS["group_size"].default:
            raise _unfitting(recipe, f"groups of {_numbers(own.groups)}, got {recipe.group_size}", "give another one")
        yield "group_size", own.groups[0], f"takes groups of {_numbers(own.groups)}"
    if not recipe.symmetric:
        yield "symmetric", True, "takes no zero points"


def _fitted_head(recipe: Recipe, own: Target) -> Iterator[_Change]:
    """Case 3: of lm_head."""
    head = recipe.lm_head
    if isinstance(head, Step):
        yield from _fitted_format(recipe, "lm_head", head, own)
    elif head is not None and head not in own.bits:
        yield "lm_head", None, f"takes weights of {_numbers(own.bits)} bits"


def _fitted_named(recipe: Recipe, own: Target) -> Iterator[_Change]:
    """Case 3: of weights that patterns name."""
    made, why = list[str](), dict[str, None]()
    for pattern, step in recipe.named:
        changes = [] if step is None else list(_fitted_format(recipe, "weights_of", step, own))
        for _, step, reason in changes:  # noqa: B007
            why[reason] = None
        made.append(f"{pattern}={KEEP if step is None else step}")
    if why:
        yield "weights_of", tuple(made), " and ".join(why)


def has_format(step: Step, own: Target) -> bool:
    """Whether the runtime of a target, if it is another one, has the codes of a weight format, in groups of the size
    that the step says.
    """
    grouped = not own.groups or step.parameters.get("group", own.groups[0]) in own.groups
    return not own.runtime or (grouped and step.name in [f"int{bits}" for bits in own.bits])


def _fitted_format(recipe: Recipe, setting: str, step: Step, own: Target) -> Iterator[_Change]:
    """Case 3: a weight format given by name; parameters that it does not say are those that the target wants."""
    if not has_format(Step(step.name), own):
        known = [f"int{bits}" for bits in own.bits]
        raise _unfitting(recipe, f"weights as {' or '.join(known)}, got {setting} {step}", "choose one of these")
    takes, given, why = parameters(named(step.name).grid), dict(step.parameters), []
    if own.groups and given.get("group", takes["group"].default) not in own.groups:
        if "group" in given:
            raise _unfitting(recipe, f"groups of {_numbers(own.groups)}, got {setting} {step}", "give another group")
        given["group"] = own.groups[0]
        why.append(f"takes groups of {_numbers(own.groups)}")
    if "symmetric" in takes and not given.get("symmetric", False):
        if "symmetric" in given:
            raise _unfitting(recipe, f"no zero points, got {setting} {step}", "leave out symmetric=false")
        given["symmetric"] = True
        why.append("takes no zero points")
    if why:
        yield setting, Step(step.name, given), " and ".join(why)


def _fitted_lookups(recipe: Recipe, own: Target) -> Iterator[_Change]:
    """Case 4."""
    if own.decodes or recipe.embedding is None:
        return
    if recipe.embedding != SETTINGS["embedding"].default:
        raise _unfitting(recipe, f"no codes in embedding tables, got embedding {recipe.embedding}", "keep it")
    yield "embedding", None, "takes constant scales alone, and those of an embedding are not"


def _unfitting(recipe: Recipe, wanted: str, advice: str) -> UserError:
    return UserError(f"target {recipe.target} takes {wanted}: {advice}, or choose another target")


def _numbers(numbers: tuple[int, ...]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def facts_of(model: ir.Model) -> Set[Fact]:
    """What holds of a file's graph that a pass may need: of one that was compiled, its packed products."""
    return frozenset({Fact.PACKED}) if any(is_product(node) for node in model.graph) else frozenset()


# What `facts_of` may tell of some file: a list that is impossible for all of them is told before any is read.
HELD = frozenset({Fact.PACKED})


def check_order(steps: Sequence[Step], held: Set[Fact] = frozenset()) -> None:
    """Raise UserError for an unknown pass, a repeated one, or one that lacks what it needs, or whom it works for."""
    names = [step.name for step in steps]
    for i, name in enumerate(names):
        PASSES.required(name)
        if name in names[:i]:
            raise UserError(f"pass {name!r} is listed twice")
    for i, name in enumerate(names):
        if PASSES[name].stage == Stage.BEFORE and any(PASSES[earlier].stage > Stage.BEFORE for earlier in names[:i]):
            raise UserError(f"pass {name!r} must come first")
    for i, name in enumerate(names):
        _check_place(name, names[:i], names[i + 1 :], held)


def _check_place(name: str, earlier: Sequence[str], later: Sequence[str], held: Set[Fact]) -> None:
    kind = PASSES[name]
    for fact in (own for own in PENDING if own in kind.ensures):
        if not any(fact in PASSES[own].takes for own in later):
            raise UserError(f"pass {name!r} must be followed by {taking(fact)}: add it to --passes after {name}")
    for fact in (own for own in Fact if own in kind.needs):
        last = next((own for own in reversed(earlier) if fact in PASSES[own].ensures | PASSES[own].takes), None)
        if last is None and fact in held:
            continue
        if last is None:
            raise UserError(f"pass {name!r} must come after {ensuring(fact)}: add it to --passes before {name}")
        if fact in PASSES[last].ensures:
            continue
        if fact in kind.takes & PASSES[last].needs:
            told = "quantize the weights" if fact == Fact.FLOAT else f"need {fact.value} to themselves"
            raise UserError(f"passes {last!r} and {name!r} both {told}: choose one")
        told = f"comes after {last!r}, where no {fact.value} are left: move it before {last}"
        raise UserError(f"pass {name!r} {told}")


def check_settings(recipe: Recipe, held: Set[Fact] = frozenset()) -> None:
    """Raise UserError for settings that no pass of the list takes, or that its passes exclude."""
    integer, given = steps_that(recipe, ensure=Fact.INTEGER), recipe.formats
    if integer and given:
        name, (setting, value) = integer[0].name, next(iter(given.items()))
        raise UserError(f"{setting}: {value} is for {ensuring(Fact.PACKED)}; {name} makes int8 of all weights")
    packed = Fact.PACKED in held or bool(steps_that(recipe, ensure=Fact.PACKED))
    if recipe.accuracy_level is not None and not packed:
        raise UserError(f"accuracy_level {recipe.accuracy_level} is for the MatMulNBits of {ensuring(Fact.PACKED)}")
    if recipe.accuracy_level is not None and (target := effective(recipe).target) != "matmulnbits":
        raise UserError(f"accuracy_level {recipe.accuracy_level} needs target matmulnbits: {target} has no such level")
    if recipe.scale_bits == 16 and not packed:
        raise UserError(f"scale_bits 16 is for the weights of {ensuring(Fact.PACKED)}")
    if recipe.scale_bits == 16 and (runtime := TARGETS[effective(recipe).target].runtime):
        raise UserError(
            f"scale_bits 16 puts Casts before scales, and {runtime} takes constant scales alone: leave it out"
        )
    if recipe.fastest and recipe.max_kl is None and recipe.min_sqnr is None:
        told = "fastest is of formats within a bound: give max_kl in nats a token"
        raise UserError(f"{told}, or of models without logits min_sqnr in dB, too")
    if recipe.mixed and not integer and not bound_of(recipe):
        told = f"{recipe.mixed} keeps nodes of {ensuring(Fact.INTEGER)} in float"
        more = f", or is kept by the formats of {ensuring(Fact.PACKED)}" if recipe.max_kl or recipe.min_sqnr else ""
        raise UserError(f"{told}{more}: add one of them to the passes")


def make_policy(recipe: Recipe) -> Policy:
    """Specs of every kind of weight; `Policy` gives them the scale type of each.

    8-bit weights are unsigned with zero points whatever `symmetric` says, but for targets that have none. Tables have
    them for all targets, and what decodes them is the target's operators.
    """
    named = tuple((pattern, None if step is None else grid(step, recipe.target)) for pattern, step in recipe.named)
    tables = {pattern: _table(step, recipe.target) for pattern, step in recipe.named if step is not None}
    if steps_that(recipe, ensure=Fact.INTEGER):
        head, table = SPEC if recipe.lm_head else None, SPEC if recipe.embedding else None
        return Policy(SPEC, head, table, recipe.include, recipe.exclude, named, target=recipe.target)
    body = grid(recipe.weights or _short(recipe.bits, recipe), recipe.target)

    def vocabulary(wanted: int | Step | None) -> Step | None:
        return _short(wanted, replace(recipe, symmetric=False)) if isinstance(wanted, int) else wanted

    logits, lookups = vocabulary(recipe.lm_head), vocabulary(recipe.embedding)
    return Policy(
        body,
        grid(logits, recipe.target) if logits else None,
        _table(lookups, recipe.target) if lookups else None,
        recipe.include,
        recipe.exclude,
        named,
        tables=tables,
        target=recipe.target,
        half_scales=recipe.scale_bits == 16,
    )


def _table(step: Step, target: str) -> Grid:
    """The grid of a table of lookups. Operators that look up 4 and 8 bits read zero points, whatever the step says."""
    own = grid(step, TARGETS[target].operators)
    return replace(own, symmetric=False) if isinstance(own, QuantSpec) and own.bits in (4, 8) else own


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
    named += [(BY_NAME, step.name) for step in recipe.formats.values()]
    for step in recipe.passes:
        known = parameters(PASSES.required(step.name))
        given = {key: _one_of(known[key].annotation) for key in step.parameters if key in known}
        named += [(own.table, str(step.parameters[key])) for key, own in given.items() if own is not None]
    found = (table.origin(name) for table, name in named)
    return {own.package: own.version for own in found if own is not None}


def summary(kind: type) -> str:
    """What a pass, an observer or a weight format is, in a line."""
    return (inspect.getdoc(kind) or "").split("\n", 1)[0]


def needs_calibration(made: Pass | type[Pass]) -> bool:
    """Whether a pass reads calibration data; a kind of pass is taken with its default parameters."""
    return bool(made.reads)


def quantizes(made: Pass | type[Pass]) -> bool:
    """Whether a pass makes codes of weights."""
    return Fact.FLOAT in made.takes


def _make(step: Step, later: Sequence[Pass], recipe: Recipe, policy: Policy) -> Pass:
    """The pass of a step, by what its constructor asks for beside the step's parameters."""
    kind = PASSES[step.name]
    given: dict[str, Any] = dict(step.parameters)
    if "seed" in parameters(kind):
        given.setdefault("seed", recipe.seed)
    storing = next((own for own in later if Fact.CODES in own.takes), None)
    facts = {
        "policy": policy,
        "rounding": following_rounding(later),
        "activations": following_grid(later),
        "refused": storing.refuses_codes if storing is not None else None,
    }
    asked = inspect.signature(kind.__init__).parameters.values()
    own = [p.name for p in asked if p.name in facts and p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return kind(*(facts[name] for name in own), **given)


def following_rounding(later: Sequence[Pass]) -> Rounding:
    """The rounding that candidates are judged by: that of the first pass behind that has one."""
    return next((own for p in later if (own := p.rounds_by) is not None), round_with_clip)


def following_grid(later: Sequence[Pass]) -> ActivationSpec | None:
    """The grid that activations will be rounded to, if a pass that comes later does that."""
    return next((own for p in later if (own := p.activation_grid) is not None), None)


def _check_parameters(owner: str, step: Step, known: Mapping[str, inspect.Parameter]) -> None:
    for key, value in step.parameters.items():
        if key not in known:
            raise UserError(f"{owner} has no parameter {key!r}; it has {', '.join(known) or 'none'}{near(key, known)}")
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
        wanted, hint = " or ".join(map(repr, one_of.names())), near(str(value), one_of.names())
        raise UserError(f"{owner}: parameter {parameter.name} takes {wanted}, got {value!r}{hint}")
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

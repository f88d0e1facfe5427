"""What to do with a model: an ordered list of passes and the settings around it, each declared here alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from qcompile.compiler.settings.amount import Amount
from qcompile.compiler.settings.setting import About, settings, shown
from qcompile.compiler.settings.steps import Step, parse_named, parse_passes, parse_step, split_list
from qcompile.passes import lists
from qcompile.passes.errors import UserError
from qcompile.passes.near import near
from qcompile.passes.targets import TargetName

__all__ = [
    "DATA",
    "DEFAULT_PASSES",
    "MIXED",
    "SAFETY",
    "SETTINGS",
    "TARGETS",
    "WHAT",
    "WHICH",
    "Recipe",
    "Step",
    "dump_recipe",
    "load_recipe",
    "parse_passes",
    "parse_step",
    "save_recipe",
    "split_list",
]
DEFAULT_PASSES = parse_passes(lists.BEST)
TARGETS: tuple[str, ...] = get_args(TargetName)
Bits = Literal[4, 8]
# The headings that options stand under. Commands that only look at a model have the middle ones.
WHAT, WHICH, DATA = "what to do", "what to quantize", "calibration"
MIXED, SAFETY = "mixed precision", "safety"
# Sizes and seeds beyond these are typing errors, or attacks.
_MOST, _LARGEST_SEED = 10**7, 2**63 - 1
# Longer files are something else.
_LARGEST_FILE = 1 << 20
# The word for float where a format may be given.
KEEP = "keep"
# Settings of which each alone says what stays in float; None by default.
_MIXED = ("keep_worst", "keep_share", "max_kl", "min_sqnr")


def _no_window(value: int) -> str:
    """Of samples and context."""
    if value > _MOST:
        return f"samples and context must be at most {_MOST}, got {value}"
    return f"samples must be at least 1 and context at least 2, got {value}"


def _no_target(value: str) -> str:
    return f"unknown target {value!r}; choose one of {', '.join(TARGETS)}{near(str(value), TARGETS)}"


def _no_group(value: int) -> str:
    return f"group size {value} is not possible; give 8 to 4096, or 0 for one scale a column"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the compiled bytes, beside the model and the calibration data.

    passes: in order; `prepare` runs first whether listed or not. weights: None: integers of so many bits and so large
    groups. lm_head, embedding: None keeps float. min_coverage: None: what `told` says, by the list's own formats.
    Passes, formats and words may be given as a file has them: Recipe(passes="smooth,qdq", lm_head="keep").
    weights_of: of "PATTERN=FORMAT". activations, accuracy_level: None: chosen node by node.
    keep_worst, keep_share, max_kl, min_sqnr: one of them at most. fastest: with one of the last two.
    """

    passes: Annotated[
        tuple[Step, ...],
        About("ordered list of passes (default: {default})", WHAT, metavar="PASSES"),
    ] = DEFAULT_PASSES
    bits: Annotated[
        Bits,
        About(
            "bits of ordinary weights; --weights has 2, 3, 5 and 6, too (default: {default})",
            WHAT,
            wrong=lambda value: f"weights are quantized to 4 or 8 bits, got {value}",
        ),
    ] = 4
    group_size: Annotated[
        int,
        About(
            "weights that share a scale; 0: one scale a column (default: {default}); --weights has its own",
            WHAT,
            metavar="N",
            least=8,
            most=4096,
            besides=(0,),
            wrong=_no_group,
        ),
    ] = 128
    symmetric: Annotated[
        bool,
        About(
            "signed codes without zero points",
            WHAT,
            opposite=("--asymmetric", "unsigned codes with zero points (default)"),
        ),
    ] = False
    weights: Annotated[
        Step | None,
        About(
            'how ordinary weights are stored: {formats}; parameters go in parentheses, such as "int4(group=64)" '
            "(default: what --bits, --group-size and --symmetric say)",
            WHAT,
            metavar="FORMAT",
        ),
    ] = None
    weights_of: Annotated[
        tuple[str, ...],
        About(
            "store weights that a pattern fits (a node, a weight or an operator) in another format, PATTERN=FORMAT, or "
            "leave them in float, PATTERN=keep; lm_head and embedding, too; the first that fits counts; may repeat",
            WHICH,
            metavar="PATTERN=FORMAT",
        ),
    ] = ()
    target: Annotated[
        TargetName,
        About(
            "operators of the output: qcompile functions (default), com.microsoft nodes, or plain ONNX; or what the "
            "documents of another runtime ask for, TensorRT or the QNN provider (checked, but not run)",
            WHAT,
            wrong=_no_target,
        ),
    ] = "qcompile"
    lm_head: Annotated[
        Bits | Step | None,
        About("bits or weight format of the output projection (default: {default})", WHICH, word=KEEP),
    ] = 8
    embedding: Annotated[
        Bits | Step | None,
        About("bits or weight format of the token embedding (default: {default})", WHICH, word=KEEP),
    ] = 8
    activations: Annotated[
        Literal[8, 16] | None,
        About(
            "bits that qcompile's CPU kernels give activations: near-exact 16, int8, or chosen node by node from the "
            "measured error (default: {default})",
            WHAT,
            word="auto",
        ),
    ] = None
    accuracy_level: Annotated[
        Literal[0, 4] | None,
        About(
            "what MatMulNBits, of target matmulnbits, makes of activations: 0 floats, slow with 8-bit weights, 4 int8 "
            "in blocks, or chosen node by node from the measured error (default: {default})",
            WHAT,
            word="auto",
        ),
    ] = None
    scale_bits: Annotated[
        Literal[16, 32],
        About(
            "bits of the scales of packed float32 weights in the file; 16, wherever exact, makes it smaller, and ONNX "
            "Runtime widens them when it loads (default: {default})",
            WHAT,
        ),
    ] = 32
    attention: Annotated[
        Literal["fused", "plain"],
        About(
            "attention beside packed weights: ONNX Runtime's MultiHeadAttention, in decoders with caches "
            "GroupQueryAttention after joined products (default), or standard operators",
            WHAT,
        ),
    ] = "fused"
    caches: Annotated[
        Literal["auto", "float16", "float"],
        About(
            "caches of float32 decoders with fused attention beside packed weights: in half precision (float16), as "
            "they are (float), or float16 in what is compiled --for genai alone (default: {default})",
            WHAT,
        ),
    ] = "auto"
    include: Annotated[
        tuple[str, ...],
        About(
            "quantize only nodes or weights of this name, or nodes of this operator; may repeat",
            WHICH,
            metavar="PATTERN",
        ),
    ] = ("*",)
    exclude: Annotated[
        tuple[str, ...],
        About("keep these in float; may repeat", WHICH, metavar="PATTERN"),
    ] = ()
    samples: Annotated[
        int,
        About("calibration windows (default: {default})", DATA, metavar="N", least=1, most=_MOST, wrong=_no_window),
    ] = 32
    context: Annotated[
        int,
        About("tokens of a window (default: {default})", DATA, metavar="N", least=2, most=_MOST, wrong=_no_window),
    ] = 512
    min_coverage: Annotated[
        float | None,
        About(
            "fail where less than this share of the MatMul-like weights or of the convolutions' is quantized (default: "
            "0.95 of those that the list has formats for, and half of all; 0: never)",
            SAFETY,
            word="auto",
            metavar="SHARE",
            least=0,
            most=1,
        ),
    ] = None
    min_cosine: Annotated[
        float,
        About(
            "fail where an output's cosine to the float model's is below this on the check batches: it is destroyed "
            "(default: {default}; 0: never)",
            SAFETY,
            metavar="COSINE",
            least=0,
            most=1,
        ),
    ] = 0.5
    seed: Annotated[
        int,
        About(
            "of everything random: same input, seed, versions and threads, same bytes (default: {default})",
            DATA,
            metavar="SEED",
            least=0,
            most=_LARGEST_SEED,
        ),
    ] = 0
    provider: Annotated[
        str,
        About(
            "execution provider for calibration and checks: cpu (default), or cuda (unverified on GPU)",
            DATA,
            metavar="PROVIDER",
        ),
    ] = "cpu"
    keep_as: Annotated[
        Literal["auto", "weights", "float"],
        About(
            "what nodes become that are left in float: float activations on int8 weights (MatMuls only), or float "
            "altogether (default: {default}, the first unless it is clearly worse)",
            MIXED,
        ),
    ] = "auto"
    keep_worst: Annotated[
        int | None,
        About(
            "leave the N nodes in float that change the output most when they are integer (`qcompile sensitivity` "
            "lists them)",
            MIXED,
            metavar="N",
            least=1,
        ),
    ] = None
    keep_share: Annotated[
        float | None,
        About(
            "leave nodes in float, those first that gain most for their work, as long as they gain, for at most this "
            "share of the model's work and of its weights",
            MIXED,
            metavar="SHARE",
            least=0,
            most=1,
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        About(
            "the least that keeps a decoder's KL to the float model below this, in nats a token on windows of the "
            "calibration text that nothing else uses: the smallest formats of packed weights, as --budget chooses "
            "them; of passes that make nodes integer, the fewest nodes left in float (the float and the integer "
            "weights are in memory at once)",
            MIXED,
            metavar="NATS",
            positive=True,
        ),
    ] = None
    min_sqnr: Annotated[
        float | None,
        About("the same for other models: signal to noise of their outputs", MIXED, metavar="DB", positive=True),
    ] = None
    budget: Annotated[
        str | None,
        About(
            "choose a format for every weight by what it changes, within the size of the output (80MB) or bits a "
            "weight with scales (3.6bpw), of packed weights; what --weights-of names stays as it says",
            MIXED,
            metavar="SIZE",
        ),
    ] = None
    fastest: Annotated[
        bool,
        About(
            "of all choices of formats that keep --max-kl or --min-sqnr, and --budget where it is given, the one that "
            "runs fastest here, by measured times of each product in each format",
            MIXED,
        ),
    ] = False

    def __post_init__(self) -> None:
        for name, own in SETTINGS.items():
            object.__setattr__(self, name, own.of_text(getattr(self, name)))
            own.check(getattr(self, name))
        if self.weights is not None and (self.bits != SETTINGS["bits"].default or self.symmetric):
            raise UserError(f"weights: {self.weights} says all of bits and symmetric: leave these out")
        if self.budget is not None:
            Amount.parse(self.budget)
        patterns = [pattern for pattern, _ in self.named]
        if len(set(patterns)) < len(patterns):
            twice = next(pattern for i, pattern in enumerate(patterns) if pattern in patterns[:i])
            raise UserError(f"weights_of: {twice!r} is there twice")
        if self.activations == 8 and self.target != "qcompile":
            raise UserError(f"activations 8 needs target qcompile: the operators of {self.target} do not take it")
        given = [name for name in _MIXED if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are two ways to choose what stays in float: give one")

    @property
    def mixed(self) -> str:
        """The setting by which nodes are to be kept in float for their sensitivity; empty where none are."""
        return next((name for name in _MIXED if getattr(self, name) is not None), "")

    @property
    def keeping_none(self) -> "Recipe":
        """The same without a setting that keeps nodes in float for their sensitivity."""
        return replace(self, keep_worst=None, keep_share=None, max_kl=None, min_sqnr=None, fastest=False)

    @property
    def activation_bits(self) -> int | None:
        """Bits that packed products are to give activations, as the target has them; None: chosen node by node."""
        if self.target == "matmulnbits":
            return None if self.accuracy_level is None else 8 if self.accuracy_level else 16
        return self.activations

    @cached_property
    def named(self) -> tuple[tuple[str, Step | None], ...]:
        """What `weights_of` says: patterns and their formats, None for float."""
        return tuple(parse_named(text, KEEP, "weights_of") for text in self.weights_of)

    @property
    def formats(self) -> dict[str, Step]:
        """By setting, the weight formats that are given by name; those of `weights_of` by their patterns."""
        own = {name: getattr(self, name) for name, setting in SETTINGS.items() if not setting.many}
        own |= {f"weights_of {pattern}": step for pattern, step in self.named}
        return {name: value for name, value in own.items() if isinstance(value, Step)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file holds them."""
        plain = {name: own.plain(getattr(self, name)) for name, own in SETTINGS.items()}
        left = set() if self.mixed else {"keep_as"}
        left |= {"scale_bits"} if self.scale_bits == SETTINGS["scale_bits"].default else set()
        left |= set() if self.fastest else {"fastest"}
        left |= {"accuracy_level"} if self.accuracy_level is None and self.target != "matmulnbits" else set()
        return {name: value for name, value in plain.items() if value is not None and name not in left}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], source: str = "recipe") -> "Recipe":
        """The recipe of plain values; an unknown key or a value of the wrong type is an error."""
        for key in plain:
            if key not in SETTINGS:
                told = f"unknown key {shown(key)}; known keys are {', '.join(SETTINGS)}{near(str(key), SETTINGS)}"
                raise UserError(f"{source}: {told}")
        return cls(**{key: SETTINGS[key].read(value, source) for key, value in plain.items()})


# What is declared above, by key.
SETTINGS = settings(Recipe)


def load_recipe(path: Path) -> Recipe:
    """The recipe in a .yaml, .yml or .toml file."""
    from qcompile.compiler.settings.files import plain_of  # what declares options loads no parser

    if path.exists() and not path.is_file():  # reading a pipe may wait for ever
        raise UserError(f"recipe {path} is not a regular file")
    try:
        if path.exists() and path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"recipe {path} has over {_LARGEST_FILE} bytes: that is no recipe")
        plain = plain_of(path.read_text(encoding="utf-8"), toml=path.suffix == ".toml")
    except UserError:
        raise
    except RecursionError as error:
        raise UserError(f"recipe {path} is nested too deeply: it must be a table of keys and values") from error
    except (OSError, ValueError) as error:  # bad UTF-8, YAML, TOML, dates, endless numbers
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())[:400]}") from error
    if not isinstance(plain, dict):
        raise UserError(f"recipe {path} must be a table of keys and values, such as 'bits: 4'")
    return Recipe.from_dict(plain, str(path))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, ready for `--recipe`."""
    path.write_text(dump_recipe(recipe), encoding="utf-8")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text."""
    from qcompile.compiler.settings.files import yaml_of

    return yaml_of(recipe.to_dict())

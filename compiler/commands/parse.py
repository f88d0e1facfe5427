"""From words to the options of a command, by cyclopts; its help; and what is wrong with them, in one line."""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

import cyclopts
from cyclopts import App, CycloptsError, Parameter, Token

from qcompile.compiler.commands.help import show
from qcompile.compiler.commands.options import COMMON, Common, group
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

T = TypeVar("T", bound=Common)
_PLAIN = Parameter(negative_bool=(), negative_iterable=(), show_default=False, show_choices=False)


def application(name: str, declared: Any) -> App:
    """The command of that name, whose options a class of `@command` declares, as cyclopts knows it."""
    made = App(
        name=name,
        help="",
        help_format="plaintext",
        version_flags=(),
        default_parameter=_PLAIN,
    )
    made["--help"].group = (group(COMMON),)
    made["--help"].help = "show this and stop"
    made.default(declared)
    return made


def parse(name: str, declared: type[T], words: Sequence[str]) -> T | None:
    """The options that the words of a command line give; None where they ask for help, which is printed."""
    made = application(name, declared)
    before = words[: words.index("--")] if "--" in words else words
    if {"-h", "--help"} & set(before):
        usage = " ".join(["qcompile", name, *_placed(declared).values(), "[options]"])
        show(usage, declared, made.assemble_argument_collection())
        return None
    try:
        _, bound, _ = made.parse_args(list(words), print_error=False, exit_on_error=False, verbose=False)
    except CycloptsError as error:
        raise UserError(f"{_told(error)} (see qcompile {name} --help)") from error
    made_of = declared(**bound.arguments)
    object.__setattr__(made_of, "given", frozenset(bound.arguments))
    return made_of


def _placed(declared: Any) -> dict[str, str]:
    """The arguments that are known by their places, by name; as the usage shows them."""
    shown = {}
    for own in declared.__signature__.parameters.values():
        if own.kind == own.POSITIONAL_ONLY:
            name = own.annotation.__metadata__[0].name[0]
            more = f"{name} …" if get_origin(own.annotation.__origin__) is tuple else name
            shown[name] = more if own.default is own.empty else f"[{more}]"
    return shown


def _told(error: CycloptsError) -> str:
    """What is wrong with the words of a command line."""
    match error:
        case cyclopts.UnknownOptionError():
            known = [name for own in error.argument_collection for name in own.names]
            word = (error.token.keyword or error.token.value).split("=")[0]
            return f"no option {word}{near(word, known)}"
        case cyclopts.UnusedCliTokensError():
            return f"nothing takes the argument {(error.unused_tokens or [''])[0]!r}"
        case cyclopts.RepeatArgumentError():
            return f"{error.token.keyword} is there twice, or with its opposite"
        case cyclopts.MissingArgumentError() if error.argument is not None:
            return _missing(error, error.argument)
        case cyclopts.ValidationError() if error.argument is not None:
            return f"{error.argument.name} {error.exception_message}"
        case cyclopts.CoercionError() if error.token is not None:
            return _unfit(error, error.token)
    return " ".join(str(error).split()).rstrip(".")


def _missing(error: cyclopts.MissingArgumentError, argument: Any) -> str:
    """Of a value behind an option, of an option that has to be there, or of an argument."""
    given = error.keyword or next((token.keyword for token in argument.tokens if token.keyword), None)
    if given is not None:
        return f"{given} takes a value: {given} {argument.parameter.metavar or ''}".rstrip()
    metavar = argument.parameter.metavar
    return f"{argument.name} {metavar} is missing" if metavar else f"{argument.name.removeprefix('--')} is missing"


def _unfit(error: cyclopts.CoercionError, token: Token) -> str:
    """Of a value that an option does not take; converters tell it themselves."""
    kind: Any = error.target_type
    if error.msg is not None:
        wrong = str(error.msg)
    elif get_origin(error.target_type) is Literal:
        choices = [str(choice) for choice in get_args(error.target_type)]
        hint = near(token.value, choices)
        wrong = (
            f"expected {' or '.join(filter(None, [', '.join(choices[:-1]), choices[-1]]))}, got {token.value!r}{hint}"
        )
    else:
        expected = {int: "an integer", float: "a number"}.get(kind, getattr(kind, "__name__", str(kind)))
        wrong = f"expected {expected}, got {token.value!r}"
    return f"{token.keyword or 'argument'}: {wrong}"

"""The JSON schema of a recipe file, for editors: from the settings that the fields of a dataclass declare."""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from qcompile.compiler.settings.setting import Setting, settings
from qcompile.compiler.settings.steps import Step


def schema(declared: type, title: str, **words: str) -> dict[str, Any]:
    """What a file of these settings may hold: every key with its type, values, ends, default and meaning.

    It says what the reader of files takes without a file at hand; names of passes and formats are texts to it.
    """
    import msgspec

    table: Mapping[str, Any] = msgspec.json.schema(struct(declared, title, **words))["$defs"][title]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **table}


def struct(declared: type, title: str, **words: str) -> Any:
    """The same as a class of msgspec, which converts what the schema allows."""
    import msgspec

    fields = [(name, _type(own, words), msgspec.UNSET) for name, own in settings(declared).items()]
    return msgspec.defstruct(title, fields, forbid_unknown_fields=True)


def _type(own: Setting, words: Mapping[str, str]) -> Any:
    """The type of the plain value in a file, with what msgspec is to know of it."""
    from msgspec import Meta

    about = own.about
    plain = own.plain(own.default)
    told = Meta(description=own.told(**words), extra_json_schema={} if plain is None else {"default": plain})
    if own.many:
        return Annotated[list[str] | str, told]
    kinds: list[Any] = [Literal[own.choices]] if own.choices else [_number(own, kind) for kind in own.kinds]
    kinds = [kind for kind in kinds if kind not in (Step, types.NoneType)]
    if Step in own.kinds:
        kinds.append(str)
    elif about.word:
        kinds.append(Literal[about.word])
    if types.NoneType in own.kinds:
        kinds.append(None)
    return Annotated[Union[tuple(kinds)], told]  # noqa: UP007


def _number(own: Setting, kind: Any) -> Any:
    """A number with its ends, as far as nothing beyond them is allowed besides."""
    from msgspec import Meta

    about = own.about
    if kind not in (int, float):
        return kind
    ends: dict[str, Any] = {"gt": 0} if about.positive else {}
    least = min([about.least, *about.besides]) if about.least is not None else None
    ends |= {
        name: kind(end) for name, end in (("ge", least), ("le", about.most)) if end is not None and end < 2**63 - 1
    }
    return Annotated[kind, Meta(**ends)] if ends else kind

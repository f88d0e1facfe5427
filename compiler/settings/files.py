"""Settings as files have them, YAML or TOML: text to plain values, and back."""

import tomllib
from collections.abc import Mapping
from typing import Any

import yaml


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


def plain_of(text: str, *, toml: bool) -> Any:
    """What a file of settings says; ValueError where it cannot be read."""
    try:
        return tomllib.loads(text) if toml else yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def yaml_of(plain: Mapping[str, Any]) -> str:
    """Settings as YAML text, in their order."""
    return str(yaml.safe_dump(dict(plain), sort_keys=False))

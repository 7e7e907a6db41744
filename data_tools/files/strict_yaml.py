"""YAML from people: a key written twice is refused, and so is what no settings file needs, before it costs anything.

A few lines of YAML can stand for terabytes (aliases of aliases, merge keys of merge keys), for minutes of arithmetic
(a number of a million digits) or for an endless value (an alias of itself). Here a file stands for as many values as it
says when everything is written out, and there is a limit to these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_tools.files.plain_file import open_plain

MAX_CHARACTERS = 1 << 18
MAX_VALUES = 5_000
"""Keys and values, lists and mappings, each alias counted as what it stands for."""
MAX_DEPTH = 50
MAX_NUMBER_CHARACTERS = 1_000


class NotYaml(ValueError):
    """Text that is not YAML, or more than a settings file can be; the message says where and why."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        NotYaml: not YAML, a key written twice, an alias of a value that holds it, or beyond one of the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotYaml(f"longer than {MAX_CHARACTERS} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML lets through what Python says of a date in month 99 (ValueError) or of a tag that does not fit its value.
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise NotYaml(str(error)) from None


def stands_for_nothing(text: str) -> bool:
    """Whether some value of a YAML document is empty or blank, or none in another way than `null` written out.

    Raises NotYaml where it is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise NotYaml(f"longer than {MAX_CHARACTERS} characters")
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        level = [root]
        while level:
            if any(isinstance(node, yaml.ScalarNode) and _is_nothing(node) for node in level):
                return True
            level = [inner for node in level if isinstance(node, yaml.CollectionNode) for inner in _inside(node)]
        return root is None
    except (yaml.YAMLError, RecursionError) as error:
        raise NotYaml(str(error)) from None
    finally:
        loader.dispose()


def _is_nothing(node: yaml.ScalarNode) -> bool:
    seen = any(character.isprintable() and not character.isspace() for character in node.value)
    return not seen or (node.tag == "tag:yaml.org,2002:null" and node.value != "null")


def _inside(node: yaml.CollectionNode) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file in UTF-8.

    Raises:
        NotYaml: see `parse_yaml`.
        OSError: the file cannot be read, or is no plain file.
    """
    with open_plain(path) as stream:
        content = stream.read(4 * MAX_CHARACTERS + 1)  # UTF-8 has at most four bytes a character
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError as error:
        raise NotYaml(str(error)) from None


class _Loader(yaml.SafeLoader):
    """Counts values while the tree is read, so that what is too much is refused before it is built."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._size_of: dict[yaml.Node, int] = {}  # values that an anchored node stands for, known when it is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, mark, before = self.check_event(yaml.AliasEvent), self.peek_event().start_mark, self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH}", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            if not is_alias:
                self._values += 1
                self._size_of[node] = self._values - before
            elif node in self._size_of:
                self._values += self._size_of[node]
            else:
                raise yaml.composer.ComposerError(None, None, "an alias of a value that holds it", mark)
            if self._values > MAX_VALUES:
                raise yaml.composer.ComposerError(None, None, f"stands for more than {MAX_VALUES} values", mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # Numbers to base 60 (1:30:00), and whole numbers, cost the square of their length.
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > MAX_NUMBER_CHARACTERS:
            raise yaml.composer.ComposerError(
                None, None, f"a number of more than {MAX_NUMBER_CHARACTERS} characters", node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        twice: set[Any] = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == "tag:yaml.org,2002:merge" else self.construct_object(key_node, deep=True)
            try:
                (twice if key in seen else seen).add(key)
            except TypeError:
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or a mapping cannot be a key", key_node.start_mark
                ) from None
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"written twice: {sorted(twice, key=str)}", node.start_mark
            )
        return super().construct_mapping(node, deep)

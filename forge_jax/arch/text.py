"""YAML in and out, with the typing of YAML 1.2 and nothing that can surprise.

`no`, `off`, `12:30` and `0777` are text or plain decimals here, not a bool, a number of minutes or
an octal; `1e4` is a number. Anchors, aliases, tags, merge keys, repeated keys and several documents
are refused, so a short text cannot grow into a large one.
"""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32
Path = tuple[str | int, ...]
"""keys and indices from the document to a node"""
Finding = tuple[Path, str]
"""where, and a sentence"""
Lines = dict[Path, int]
"""path of a node -> its line, from 1"""


class DocumentError(ValueError):
    """The document says something that cannot be built; the message has one line per problem."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the types of YAML 1.2's core schema."""


_LETTERS = list("-+.0123456789")
_TYPES = [
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    # a longer number is a float: int() refuses thousands of digits
    ("int", r"[-+]?[0-9]{1,18}", _LETTERS),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", _LETTERS),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _LETTERS),
]
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _TYPES:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )


def _decimal(loader: yaml.SafeLoader, node: Any) -> int:
    """An integer; SafeLoader would read a leading zero as an octal."""
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_yaml(text: str) -> tuple[Any, Lines]:
    """The document as plain dicts, lists and scalars, and the line of every path.

    Raises:
      DocumentError: no YAML, or YAML of the kinds that the module refuses.
    """
    if len(text) > MAX_CHARACTERS:
        raise DocumentError(
            f"The document must have at most {MAX_CHARACTERS} characters, got {len(text)}."
        )
    try:
        _refuse_tricks(text)
        root = _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DocumentError(f"{where}the document is no YAML: {reason}.") from None
    if root is None:
        raise DocumentError("The document is empty.")
    lines: Lines = {}
    return _plain(root, (), lines), lines


def _refuse_tricks(text: str) -> None:
    depth = documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise DocumentError(f"{line}: aliases are not allowed, got *{event.anchor}.")
        if getattr(event, "anchor", None):
            raise DocumentError(f"{line}: anchors are not allowed, got &{event.anchor}.")
        if getattr(event, "tag", None):
            raise DocumentError(f"{line}: tags are not allowed, got {event.tag}.")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise DocumentError(f"{line}: wanted one document, got another.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise DocumentError(f"{line}: nested more than {MAX_DEPTH} deep.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(node: yaml.Node, path: Path, lines: Lines) -> Any:
    """Construct a node and note where it and its children stand."""
    line = lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    out: dict[str, Any] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        name = _scalar(key) if isinstance(key, yaml.ScalarNode) else None
        if not isinstance(name, str):
            raise DocumentError(f"{dotted(path)} (line {line}): a key must be text, got {name}.")
        if name in out:
            raise DocumentError(f"{dotted((*path, name))} (line {line}): the key stands twice.")
        out[name] = _plain(child, (*path, name), lines)
        lines[(*path, name)] = line
    return out


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    return loader.construct_object(node)


def dotted(path: Path) -> str:
    """A path as `arch.mix_unit.choices[0].heads`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the document"


def write_yaml(document: Any) -> str:
    """The document as YAML that `read_yaml` reads back unchanged."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes for both typings, 1.1 and 1.2, and never makes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        """Repeat equal nodes."""
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
    for first in [*yaml.SafeDumper.yaml_implicit_resolvers]
}
for _tag, _pattern, _first in _TYPES:
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )

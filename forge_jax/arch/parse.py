"""From text to a checked document and back."""

import json
from typing import Any

from pydantic import ValidationError

from forge_jax.arch import rules
from forge_jax.arch.schema import Spec
from forge_jax.arch.text import DocumentError, Finding, Lines, Path, dotted, read_yaml, write_yaml


def parse(text: str, *, strict: bool = False) -> Spec:
    """Read a document.

    With `strict` fields without effect, and values that would be cut to a limit, are errors too;
    otherwise `notes` lists them.

    Raises:
      DocumentError: every problem, one line each, with its path and line in the text.
    """
    document, lines = read_yaml(text)
    return _checked(document, lines, strict)


def from_dict(document: Any, *, strict: bool = False) -> Spec:
    """The same for a document of plain dicts, lists and scalars."""
    return _checked(document, {}, strict)


def _checked(document: Any, lines: Lines, strict: bool) -> Spec:
    if not isinstance(document, dict):
        raise DocumentError(f"The document must be a mapping, got {type(document).__name__}.")
    try:
        # JSON, because strict types take a list for a tuple from there only
        spec = Spec.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = [_located(problem, document) for problem in error.errors()]
        raise _report(found, lines) from None
    found = rules.problems(spec)
    if strict and not found:
        found = rules.notes(spec)
    if found:
        raise _report(found, lines)
    return spec


def _located(problem: Any, document: Any) -> Finding:
    """One of pydantic's problems with the path in the document and what stands there."""
    path: list[str | int] = []
    here = document
    for i, part in enumerate(problem["loc"]):
        keys = range(len(here)) if isinstance(here, list) else here
        if isinstance(here, dict | list) and part in keys:
            path.append(part)
            here = here[part]
        elif problem["type"] == "missing" and i == len(problem["loc"]) - 1:
            path.append(part)  # any other part is a member of a union, not of the document
    reason = problem["msg"][:1].lower() + problem["msg"][1:]
    if problem["type"] in ("missing", "extra_forbidden"):
        kind = "is needed" if problem["type"] == "missing" else "is no field of this mapping"
        return tuple(path), kind
    shown = json.dumps(here, default=str)
    return tuple(path), f"{reason}, got {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _report(found: list[Finding], lines: Lines) -> DocumentError:
    rows = {f"  {locate(path, lines)}: {sentence}" for path, sentence in found}
    return DocumentError("\n".join(["The document does not fit:", *sorted(rows)]))


def locate(path: Path, lines: Lines) -> str:
    """A path, with the line of it or of the nearest parent that has one."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return f"{dotted(path)} (line {lines[path[:length]]})"
    return dotted(path)


def notes(spec: Spec) -> tuple[str, ...]:
    """What the document says without effect or beyond a limit, one sentence each."""
    return tuple(f"{dotted(path)}: {sentence}" for path, sentence in rules.notes(spec))


def to_dict(spec: Spec) -> dict[str, Any]:
    """The document as plain data, without what it leaves open; `from_dict` reads it back."""
    return spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def emit(spec: Spec) -> str:
    """The document as YAML; `parse` reads it back unchanged."""
    return write_yaml(to_dict(spec))

"""Architectures from documents: check one, and say what it costs.

python -m experiments.evolve validate experiments/archs/nanogpt_tiny.yaml
python -m experiments.evolve schema --out arch.schema.json

`validate` ends with status 1 where a document is invalid; training and search come later.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.files import write_json
from forge_jax import arch


@dataclasses.dataclass(frozen=True)
class Validate:
    """Check documents; print fingerprint, cost and notes."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """YAML documents"""
    strict: bool = False
    """refuse fields without effect and values that would be cut"""


@dataclasses.dataclass(frozen=True)
class Schema:
    """Write the JSON Schema, for editors."""

    out: Path
    """where it goes"""


Args = (
    Annotated[Validate, tyro.conf.subcommand("validate")]
    | Annotated[Schema, tyro.conf.subcommand("schema")]
)


def described(spec: arch.Spec) -> str:
    """What a valid document comes to."""
    spent = arch.cost(spec)
    lines = [
        f"fingerprint {arch.fingerprint(spec)}",
        f"parameters {spent.params:,}",
        f"forward FLOPs per token {spent.flops / spec.train.ctx_len:,.0f}",
        f"KV bytes per token {spent.kv_bytes:,.0f}",
        *(f"note: {note}" for note in arch.notes(spec)),
    ]
    return "\n".join(lines)


def validate(path: Path, strict: bool) -> bool:
    """Print the verdict on a file; True where it is valid."""
    try:
        spec = arch.parse(path.read_text(), strict=strict)
    except (arch.DocumentError, OSError, UnicodeDecodeError) as error:
        print(f"INVALID {path}\n{error}")
        return False
    print(f"VALID {path}\n{described(spec)}")
    return True


def main(args: Args) -> int:
    """Run a command; its exit status."""
    if isinstance(args, Schema):
        write_json(args.out, arch.json_schema())
        return 0
    return 0 if all([validate(path, args.strict) for path in args.files]) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, prog="python -m experiments.evolve", description=__doc__)))

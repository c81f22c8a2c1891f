"""The house keeps its rules: arrows between rooms point down, and the core is pure.

The source is read with `ast`, never imported, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"forge_jax": set(), "interop": {"forge_jax"}, "experiments": {"forge_jax", "interop"}}
# Room of the core -> the rooms it may import (itself always).
ROOMS = {
    "svf": set(),
    "optim": set(),
    "models": set(),
    "domains": set(),
    "arch": {"models"},
    "parallel": {"svf"},
    "search": {"parallel", "svf"},
    "rl": {"models"},
    "adapt": {"models", "search", "svf"},
    "evolve": {"arch", "search"},
}
FOREIGN = {
    *("torch", "transformers", "tokenizers", "safetensors", "gguf", "datasets", "wandb"),
    *("orbax", "matplotlib", "tyro", "tensorboardX", "tqdm", "rich", "sklearn", "reasoning_gym"),
    *("peft", "trl", "accelerate"),
}
FILES = {"os", "io", "pathlib", "shutil", "tempfile", "pickle", "subprocess", "socket", "urllib"}
CALLS = {
    *("open", "print", "input", "exec", "eval"),
    *("read_text", "read_bytes", "write_text", "write_bytes"),
    "import_module",
    *("load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "fromfile", "tofile"),
}


# The tokenizers library raises bare Exception for a broken file, and nothing narrower.
MAY_CATCH_ALL = {("interop/companions.py", "make_tokenizer")}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path, tree):
    """Yield (line, dotted module) of every import; relative ones are made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from forge_jax import svf` imports the room forge_jax.svf.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upward(path, tree):
    """Yield a sentence for each import that breaks the order of packages or rooms."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[0]
    # forge_jax/__init__.py is above the rooms and may import them all.
    room = parts[1] if package == "forge_jax" and len(parts) > 2 else None
    for line, module in imports(path, tree):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top in PACKAGES and top != package and top not in PACKAGES[package]:
            yield f"{path.relative_to(ROOT)}:{line} imports {module}"
        elif top == "forge_jax" and room and other in ROOMS:
            if other != room and other not in ROOMS.get(room, set()):
                yield f"{path.relative_to(ROOT)}:{line} ({room}) imports {module}"
        elif package == "forge_jax" and (top in FOREIGN or top in FILES):
            yield f"{path.relative_to(ROOT)}:{line} imports {module}"


def impure_calls(path, tree):
    """Yield a sentence for each call that prints or touches a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in CALLS:
                yield f"{path.relative_to(ROOT)}:{node.lineno} calls {name}"


def broad_handlers(path, tree):
    """Yield a sentence for each handler that catches everything, and for postponed annotations."""
    broad = {"Exception", "BaseException"}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    file = path.relative_to(ROOT).as_posix()
    allowed = {id(n) for f in functions if (file, f.name) in MAY_CATCH_ALL for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in allowed:
            continue
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler):
            caught = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
            if node.type is None or caught & broad:
                yield f"{where} catches everything"
        elif isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield f"{where} imports from __future__"


def unsafe_loads(path, tree):
    """Yield a sentence for each torch.load that is not told weights_only=True."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"):
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if given.get("weights_only") != "True":
            yield f"{path.relative_to(ROOT)}:{node.lineno} torch.load without weights_only=True"


def problems(rule, *folders):
    return [line for path in sources(*folders) for line in rule(path, ast.parse(path.read_text()))]


def test_every_arrow_points_down():
    assert problems(upward, *PACKAGES) == []


def test_the_core_neither_prints_nor_touches_files():
    assert problems(impure_calls, "forge_jax") == []


def test_no_handler_catches_everything():
    assert problems(broad_handlers, *PACKAGES, "tests") == []


def test_pickles_are_data():
    assert problems(unsafe_loads, *PACKAGES, "tests") == []


def test_rooms_are_known():
    """A new folder in the core has to be given its place among the arrows."""
    folders = {p.name for p in (ROOT / "forge_jax").iterdir() if p.is_dir()} - {"__pycache__"}
    assert folders <= set(ROOMS)


def test_no_source_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*PACKAGES)}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > 400} == {}


def test_packages_are_typed():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


@pytest.mark.parametrize(
    ("where", "code", "rule"),
    [
        ("forge_jax/svf/x.py", "from forge_jax.models import Decoder", upward),
        ("forge_jax/svf/x.py", "from forge_jax import models", upward),
        ("forge_jax/optim/x.py", "def f():\n    from ..rl import ppo_loss", upward),
        ("forge_jax/models/x.py", "import torch", upward),
        ("forge_jax/models/x.py", "from pathlib import Path", upward),
        ("interop/x.py", "import experiments.run", upward),
        ("forge_jax/rl/x.py", "jax.debug.print('x')", impure_calls),
        ("forge_jax/rl/x.py", "np.load('x.npy')", impure_calls),
        ("interop/x.py", "try:\n    f()\nexcept (OSError, Exception):\n    pass", broad_handlers),
        ("interop/x.py", "try:\n    f()\nexcept:\n    pass", broad_handlers),
        ("interop/x.py", "from __future__ import annotations", broad_handlers),
        ("interop/x.py", "torch.load(path)", unsafe_loads),
        ("interop/x.py", "torch.load(path, weights_only=False)", unsafe_loads),
    ],
)
def test_the_rules_find_what_they_forbid(where, code, rule):
    assert list(rule(ROOT / where, ast.parse(code)))


@pytest.mark.parametrize(
    ("where", "code", "rule"),
    [
        ("forge_jax/search/x.py", "from forge_jax import svf", upward),
        ("forge_jax/svf/x.py", "from .layout import Layout", upward),
        ("forge_jax/__init__.py", "from . import svf, rl", upward),
        ("experiments/x.py", "import interop, forge_jax.svf, torch", upward),
        ("interop/x.py", "try:\n    f()\nexcept OSError:\n    pass", broad_handlers),
        ("interop/x.py", "torch.load(path, weights_only=True)", unsafe_loads),
    ],
)
def test_the_rules_allow_what_is_allowed(where, code, rule):
    assert not list(rule(ROOT / where, ast.parse(code)))

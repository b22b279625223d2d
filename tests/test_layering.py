"""One-way imports: server -> models -> kernels, a pure scheduler, and an HTTP process without torch.

Reads the sources only. Imports inside functions count too; those under TYPE_CHECKING do not.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("server", "kernels", "models")
SOURCES = sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py"))

STDLIB = frozenset(sys.stdlib_module_names) - {"asyncio"}
HTTP = frozenset({"fastapi", "starlette", "pydantic", "uvicorn"})
MODEL = frozenset({"torch", "triton", "transformers", "safetensors", "octavo.models", "octavo.kernels"})
SHARED = frozenset({"octavo.server.errors", "octavo.server.config"})
PURE = frozenset(
    f"octavo.server.engine.{name}" for name in ("request", "plan", "block_pool", "prefix_cache", "scheduler")
)
ASKING = frozenset(
    f"octavo.server.engine.{name}"
    for name in (
        *("client", "supervisor", "epoch", "group", "nodes", "progress", "devices"),
        *("known_answer", "channel", "journal", "request"),
    )
)

# Module prefix -> (prefixes of ours that it may import, prefixes of others that it must not). The first row that fits
# a module counts. Where the second entry is None, only the pure part of the standard library may be imported.
RULES: list[tuple[str, frozenset[str], frozenset[str] | None]] = [
    ("octavo.kernels", frozenset({"octavo.kernels"}), HTTP | {"transformers"}),
    ("octavo.models", frozenset({"octavo.models", "octavo.kernels"}), HTTP | {"transformers"}),
    ("octavo.server.errors", frozenset(), None),
    ("octavo.server.config", frozenset(), None),
    ("octavo.server.engine.request", frozenset(), None),
    ("octavo.server.engine.plan", frozenset({"octavo.server.engine.request"}), None),
    ("octavo.server.engine.block_pool", frozenset(), None),
    ("octavo.server.engine.prefix_cache", frozenset({"octavo.server.engine.block_pool"}), None),
    ("octavo.server.engine.scheduler", PURE, None),
    ("octavo.server.engine.devices", frozenset(), None),
    ("octavo.server.engine.channel", ASKING | SHARED, HTTP | MODEL),
    ("octavo.server.engine.journal", ASKING | SHARED, HTTP | MODEL),
    ("octavo.server.engine.progress", frozenset(), None),
    ("octavo.server.engine.faults", frozenset(), None),
    (
        "octavo.server.engine.nodes",
        SHARED | {"octavo.server.engine.progress"},
        HTTP | MODEL | {"asyncio"},
    ),
    ("octavo.server.engine.node", SHARED | ASKING, HTTP | MODEL | {"asyncio"}),
    (
        "octavo.server.engine.group",
        SHARED | {"octavo.server.engine.nodes", "octavo.server.engine.progress"},
        HTTP | MODEL | {"asyncio"},
    ),
    ("octavo.server.engine.known_answer", ASKING, HTTP | MODEL | {"asyncio"}),
    ("octavo.server.engine.epoch", ASKING | SHARED, HTTP | MODEL),
    ("octavo.server.engine.supervisor", ASKING | SHARED, HTTP | MODEL),
    ("octavo.server.engine.client", ASKING | SHARED, HTTP | MODEL),
    (
        "octavo.server.engine",  # what runs in the engine process
        SHARED | {"octavo.server.engine", "octavo.models", "octavo.kernels", "octavo.__version__"},
        HTTP | {"transformers"},
    ),
    ("octavo.server.text", SHARED | {"octavo.server.text", "octavo.server.engine.request"}, HTTP | MODEL),
    ("octavo.server.api", SHARED | ASKING | {"octavo.server.api", "octavo.server.text", "octavo.__version__"}, MODEL),
    ("octavo.server", frozenset({"octavo"}), frozenset()),  # commands: they put the parts together
]


def within(module: str, prefixes: frozenset[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("octavo", *parts)).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a source imports; `from a import b` counts as a.b, since b may be a module."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                continue
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                prefix = "." * level + (f"{module}." if module else "")
                yield from (prefix + alias.name for alias in names)
        yield from imports(node)


def violations(module: str, source: str) -> list[str]:
    _, ours, forbidden = next(rule for rule in RULES if within(module, frozenset({rule[0]})))
    tree = ast.parse(source)
    found = []
    for name in imports(tree):
        top = name.partition(".")[0]
        if not top:
            found.append(f"{name}: relative import")
        elif top in TREES:
            found.append(f"{name}: must be octavo.{name}")
        elif top in ("tests", "benchmarks") or name.startswith("octavo.benchmarks"):
            found.append(f"{name}: nothing imports tests or benchmarks")
        elif top == "octavo":
            if not within(name, ours | {module}):
                found.append(f"{name}: not below {module}")
        elif top in ("pickle", "cloudpickle", "dill", "marshal", "shelve") or name == "torch.load":
            found.append(f"{name}: unsafe on the serving path")
        elif top not in STDLIB if forbidden is None else within(name, forbidden):
            found.append(f"{name}: not for {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            found.append("torch.load: unsafe on the serving path")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_imports_go_one_way(path: Path) -> None:
    assert violations(module_name(path), path.read_text()) == []


def test_the_trees_have_no_package_at_their_root() -> None:
    """With one, a bare `import kernels` from the root would find ours instead of the published package."""
    assert [tree for tree in (*TREES, "tests") if (ROOT / tree / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("octavo.kernels.norm", "from octavo.models import llama"),
        ("octavo.models.llama", "import octavo.server.config"),
        ("octavo.models.llama", "def f():\n    from octavo.server.errors import StartupError"),
        ("octavo.models.llama", "from transformers import AutoModel"),
        ("octavo.server.engine.scheduler", "import asyncio"),
        ("octavo.server.engine.scheduler", "import numpy as np"),
        ("octavo.server.engine.scheduler", "import msgspec"),
        ("octavo.server.engine.scheduler", "from octavo.server.engine.channel import EngineStats"),
        ("octavo.server.engine.block_pool", "from octavo.server.engine.prefix_cache import PrefixCache"),
        ("octavo.server.engine.client", "from octavo.server.engine.engine import Engine"),
        ("octavo.server.engine.client", "from octavo.server.engine import engine"),
        ("octavo.server.engine.runner", "from octavo.server.api.app import create_app"),
        ("octavo.server.engine.runner", "import fastapi"),
        ("octavo.server.text.tokenizer", "if True:\n    import torch.nn"),
        ("octavo.server.text.tokenizer", "from transformers import AutoTokenizer"),
        ("octavo.server.api.routes", "from octavo.server.engine.scheduler import Scheduler"),
        ("octavo.server.api.routes", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("octavo.server.api.routes", "from . import schemas"),
        ("octavo.server.cli", "import kernels"),
        ("octavo.server.cli", "from server.config import ServerConfig"),
        ("octavo.server.cli", "from octavo.benchmarks import serving"),
        ("octavo.models.loader", "import pickle"),
        ("octavo.models.loader", "import torch\nweights = torch.load('x')"),
        ("octavo.models.loader", "from torch import load"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "octavo.models.llama",
            "import torch\nfrom octavo.kernels.matmul import matmul\nfrom octavo.models import batch",
        ),
        ("octavo.server.engine.scheduler", "import heapq\nfrom octavo.server.engine.plan import StepPlan"),
        ("octavo.server.engine.runner", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastapi"),
        ("octavo.server.api.app", "import asyncio\nfrom fastapi import FastAPI\nfrom octavo import __version__"),
        ("octavo.server.engine.process", "from octavo.server.engine.engine import Engine"),
        ("octavo.server.cli", "from octavo.server.serve import run"),
    ],
)
def test_an_allowed_import_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


@pytest.mark.parametrize("module", ["octavo.server.api.app", "octavo.server.serve", "octavo.server.cli"])
def test_the_http_process_loads_no_torch(module: str) -> None:
    """Seconds of start-up and hundreds of megabytes that the front end does not need."""
    heavy = ("torch", "transformers", "triton")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr

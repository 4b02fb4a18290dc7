"""Imports point one way: every room of volo/ stands on those before it, and on nothing else; and they are quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "volo"

# A room may import itself and rooms of earlier lines; rooms of one line know nothing of one another.
ORDER = [
    ["volo.runtime"],
    ["volo.config", "volo.published_results", "volo.reporting"],
    ["volo.cli"],
    ["volo.models", "volo.data"],
    ["volo.token_labels"],
    ["volo.losses"],
    ["volo.engine"],
    ["volo.build"],
    ["volo.training", "volo.validation", "volo.prepare_imagenet"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# The network can be used without the rest: it takes plain arguments and knows nothing of runs, ranks or logging.
FORBIDDEN = {"volo.models": ("volo.config", "volo.published_results", "volo.reporting", "volo.cli")}


def room_of(module: str) -> str | None:
    """The room that a dotted name lies in; None for the package itself and for other packages."""
    return ".".join(module.split(".")[:2]) if module.startswith("volo.") else None


# Names of the package itself that it takes from a room when they are asked for.
EXPORTS = {"create_model": "volo.models", "list_models": "volo.models", "load_checkpoint": "volo.models"}


def imported(source: str) -> set[str]:
    """Every module of volo that ``source`` imports, at its top, in functions or for type checking."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"an import by a name that cannot be read: {ast.unparse(node)}"
            found.add(name.value)
    return {name for name in found if f"{name}.".startswith("volo.")}


def violations(module: str, source: str) -> list[str]:
    """What ``module`` imports and may not."""
    own = room_of(module)
    wrong = []
    for name in sorted(imported(source)):
        other = room_of(name)
        # The package as a whole reaches every room, by its attributes.
        other = EXPORTS.get(name.removeprefix("volo."), other)
        if other == own:
            continue
        if other not in LEVEL or LEVEL[other] >= LEVEL[own] or other in FORBIDDEN.get(own, ()):
            wrong.append(f"{module} imports {name}")
    return wrong


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    assert room_of(module) in LEVEL, "a room that has no place in the order"
    assert violations(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("volo.data.loader", "from volo.token_labels.source import LabelSource", 1),
        ("volo.data.loader", "def f():\n    from volo import engine", 1),
        ("volo.data.loader", "from volo.models import create_model", 1),
        ("volo.models.volo", "import volo.config", 1),
        ("volo.data.loader", "import volo", 1),
        ("volo.data.loader", "from volo import create_model", 1),
        ("volo.engine.trainer", "from volo import create_model", 0),
        ("volo.data.loader", "from volo import no_such_room", 1),
        ("volo.data.loader", "import importlib\nimportlib.import_module('volo.losses')", 1),
        ("volo.data.loader", "__import__('volo.engine.optim')", 1),
        ("volo.engine.trainer", "from importlib import import_module\nimport_module('volo.losses')", 0),
        ("volo.engine.trainer", "from volo.data.loader import TrainLoader\nfrom volo.runtime import rng", 0),
    ],
)
def test_what_the_rule_refuses(module, source, count):
    assert len(violations(module, source)) == count


USE = """
import sys, torch, volo, volo.validation
volo.create_model("volo_nano", img_size=32)(torch.zeros(2, 3, 32, 32)).cls.sum().backward()
print({"timm", "torchvision", "torch._dynamo"} & set(sys.modules))
"""


def test_network_and_evaluation_import_neither_timm_nor_the_compiler():
    # Each of them takes as long to import as the rest of PyTorch.
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

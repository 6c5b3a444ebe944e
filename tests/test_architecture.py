"""Imports go downward only: the table below is the house's floor plan, and every module has a floor."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = [
    {"fasttrain", "fasttrain.errors", "fasttrain.callbacks"},
    {"fasttrain.recipe", "fasttrain.system", "fasttrain.conv", "fasttrain.ema", "fasttrain.cuda_graph"},
    {"fasttrain.options"},
    {"fasttrain.optim", "fasttrain.data"},
    {"fasttrain.model", "fasttrain.loss"},
    {"fasttrain.distributed"},
    {"fasttrain.runtime"},
    {"fasttrain.evaluation", "fasttrain.step"},
    {
        "fasttrain.compile",
        "fasttrain.full_recipe",
        "fasttrain.checkpoint",
        "fasttrain.report",
    },
    {"fasttrain.lr_finder"},
    {"fasttrain.tools", "fasttrain.trainer"},
    {"fasttrain.cli", "fasttrain.api"},
    {"fasttrain.__main__"},
]
"""From the ground up. A package stands for all of its modules, which may import each other."""

HEAVY = {
    "torch",
    "nvidia",
    "matplotlib",
    "jinja2",
    "torch_lr_finder",
    "torchinfo",
    "tensorboard",
    "PIL",
    "pyarrow",
}
LIGHT_MODULES = [
    "fasttrain",
    "fasttrain.data",
    "fasttrain.errors",
    "fasttrain.recipe",
    "fasttrain.system.files",
    "fasttrain.system.run_folder",
    "fasttrain.cli",
]


def module_paths() -> dict[str, Path]:
    paths = {}
    for path in sorted((ROOT / "fasttrain").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    return paths


MODULES = module_paths()
SOURCES = [path for folder in ("fasttrain", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]


class WithoutTypeChecking(ast.NodeTransformer):
    """Drops what is there for type checkers alone, as the names that the package fetches on first use."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or nested; of `from package import module`, the latter."""
    for node in ast.walk(WithoutTypeChecking().visit(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def constructs(node: ast.AST) -> bool:
    """Whether code constructs a network, by itself, through functools.partial or as another class."""
    named: list[ast.expr] = []
    if isinstance(node, ast.Call):
        named = [node.func, *node.args]
    elif isinstance(node, ast.ClassDef):
        named = node.bases
    return any(ast.unparse(one).endswith(("CustomResNet", "CompactNet")) for one in named)


def test_every_network_comes_from_its_recipe() -> None:
    """One that was constructed elsewhere once lost its activation: build_model passes every setting on."""
    constructing = [
        path.relative_to(ROOT).as_posix()
        for folder in ("fasttrain", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if constructs(node)
    ]
    assert constructing == ["fasttrain/model.py"]


def place(module: str) -> tuple[int, str]:
    """The floor of a module and the entry of FLOORS that names it: the module or the package it is in."""
    named = [(floor, entry) for floor, entries in enumerate(FLOORS) for entry in entries]
    return max((one for one in named if f"{module}.".startswith(f"{one[1]}.")), key=lambda one: len(one[1]))


def test_every_module_has_a_floor() -> None:
    assert [module for module in MODULES if module != "fasttrain" and place(module)[1] == "fasttrain"] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module: str) -> None:
    for target in imports(MODULES[module]):
        if target.split(".")[0] == "fasttrain":
            (below, package), (above, own_package) = place(target), place(module)
            assert below < above or package == own_package, f"{module} imports {target}"
        assert target.split(".")[0] not in {"benchmarks", "tests"}, f"{module} imports {target}"


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter({module: {*imports(path)} & {*MODULES} for module, path in MODULES.items()}).prepare()


def test_rich_draws_only_where_a_person_looks() -> None:
    """Only commands print tables. The others draw progress bars and the log of a run, on this console."""
    drawing = {
        name for name, path in MODULES.items() if any(i.split(".")[0] == "rich" for i in imports(path))
    }
    assert {name for name in drawing if place(name)[1] != "fasttrain.tools"} == {
        "fasttrain.system.console",
        "fasttrain.system.progress",
        "fasttrain.system.run_log",
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_and_functions_are_short_enough_to_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > 70} == {}


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_brings_nothing_heavy(module: str) -> None:
    """`--help` and a mistyped flag are answered at once because these bring neither torch nor DALI."""
    done = run_python(f"import sys, {module}; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_importing_says_nothing() -> None:
    done = run_python(f"import importlib\nfor name in {list(MODULES)}: importlib.import_module(name)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

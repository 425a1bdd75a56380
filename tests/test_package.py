"""The package as a whole: what it imports, in which direction, and what its wheel holds."""

import ast
import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxpeft"

# Rooms, and the rooms that each may import. `front` is jaxpeft/__init__.py, which exports the core and
# the methods: nothing imports it, or every import would be a circle. `core` is every module at the
# top level whose name starts with an underscore, together with `_rules` and `_tracing`.
CORE = {"core"}
METHODS = CORE | {"extend", "calibration", "sparsity", "_methods"}
ARROWS = {
    "core": CORE,
    "bridge": CORE,
    "extend": CORE | {"extend"},
    "calibration": CORE | {"extend", "calibration"},
    "sparsity": CORE | {"extend", "calibration", "sparsity"},
    "_methods": METHODS,
    "quant": METHODS | {"quant"},
    "adapters": METHODS | {"adapters"},
    "mixtures": METHODS | {"adapters", "mixtures"},
    "prompts": METHODS | {"prompts"},
    "front": METHODS | {"quant"},
    "optim": METHODS | {"adapters", "optim"},
    "data": CORE | {"data"},
    "io": METHODS | {"quant", "io"},
    "models": CORE | {"quant", "io", "models"},
    "train": METHODS | {"prompts", "optim", "train"},
    "serve": CORE | {"models", "serve"},
}
FOLDERS = set(ARROWS) - {"core", "bridge", "front"}

# Loaded by those who ask for them, never by `import jaxpeft`.
HEAVY = ("grain", "orbax", "tokenizers", "rich", "matplotlib", "jinja2")
# Oracles of the tests; and JAX's internals, which change without notice.
FORBIDDEN = ("torch", "transformers", "peft", "bitsandbytes", "jax._src", "jaxlib")


def modules() -> dict[str, ast.Module]:
    """Every module of the package, dotted name to syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that a module imports, at its top or inside a function.

    `from a import b` counts as `a.b`, since b may be a module.
    """
    found = []
    for node in walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}, line {node.lineno}"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def walk(tree: ast.AST):
    """Every node but those that only tools see, below `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from walk(child)


def at_the_top(tree: ast.Module) -> list[str]:
    """Those imported when the module is; an import inside a function waits until it is called."""
    return imports(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]))


def layer(module: str) -> str:
    """The room of a dotted name: its folder, else `bridge`, `front` or `core`."""
    parts = module.split(".")
    if len(parts) == 1:
        return "front"
    if parts[1] in FOLDERS or parts[1] == "bridge":
        return parts[1]
    return "core"


def target(name: str, known: set[str]) -> str:
    """The module that an imported name lives in: `jaxpeft.tree.split` is in `jaxpeft.tree`."""
    while name not in known:
        name = name.rpartition(".")[0]
    return name


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_an_oracle_or_internals(module):
    for name in imports(MODULES[module]):
        for prefix in FORBIDDEN:
            assert not (name + ".").startswith(prefix + "."), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    known = set(MODULES) | {"jaxpeft"}
    for name in imports(MODULES[module]):
        if (name + ".").startswith("jaxpeft."):
            home = target(name, known)
            allowed = ARROWS[layer(module)]
            assert layer(home) in allowed, f"{module} ({layer(module)}) imports {home}"


def test_no_modules_import_each_other_in_a_circle():
    known = set(MODULES)
    edges = {
        module: {target(n, known) for n in at_the_top(tree) if (n + ".").startswith("jaxpeft.")}
        for module, tree in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for other in sorted(edges.get(module, ())):
                # A package's __init__ re-exports its own files, which is no circle.
                if other != module and not module.startswith(other + "."):
                    visit(other, (*above, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_flax_stays_out_of_the_core():
    for module, tree in MODULES.items():
        if layer(module) not in {"bridge", "models"}:
            assert not [n for n in imports(tree) if n.split(".")[0] == "flax"], module


def test_importing_the_package_loads_nothing_heavy():
    code = "import json, sys, jaxpeft; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "jax" in loaded
    assert not loaded & {*HEAVY, "torch", "transformers", "peft"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout gets no build folder."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    tracked = ["pyproject.toml", "README.md", "LICENSE", "jaxpeft"]
    subprocess.run(["cp", "-r", *tracked, str(source)], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("jaxpeft-*.whl")
    return built


def test_the_wheel_is_small_typed_and_whole(wheel):
    assert wheel.stat().st_size < 1_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "jaxpeft/py.typed" in names
    assert {n for n in names if n.endswith(".py")} == {
        path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")
    }


def test_it_installs_without_extras_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    probe = [*pip, "download", "--no-deps", "-q", "-d", str(tmp_path), "optax"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("pip reaches no package index from here")
    done = subprocess.run([*pip, "install", "-q", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # From a folder outside the checkout, or `import jaxpeft` would find the source.
    done = subprocess.run(
        [python, "-c", "import jaxpeft; print(jaxpeft.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path)), done.stdout

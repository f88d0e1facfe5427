"""Imports point one way (docs/architecture.md), and importing qcompile loads neither torch nor ONNX Runtime."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import floors, imports, rooms, table

from qcompile.compiler.recipe import TARGETS
from qcompile.passes.table import PASSES

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("compiler", "passes", "runtime", "models")
ERRORS = "qcompile.passes.errors"
# What the modules of each layer may import; a package stands for its submodules too.
ALLOWED = {
    "compiler": {"qcompile.compiler", "qcompile.passes", "qcompile.runtime", "qcompile.models"}
    | {"cyclopts", "msgspec", "psutil", "numpy", "onnx", "onnx_ir", "rich", "yaml", "tokenizers", "threadpoolctl"},
    "passes": {"qcompile.passes", "numpy", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "threadpoolctl"},
    "runtime": {
        "qcompile.runtime",
        ERRORS,
        "qcompile.passes.interrupts",
        "qcompile.passes.library",
        "qcompile.passes.threads",
        "qcompile.passes.workers",
        "numpy",
        "onnx",
        "psutil",
        "threadpoolctl",
    },
    "models": {
        "qcompile.models",
        ERRORS,
        "qcompile.passes.near",
        "platformdirs",
        "numpy",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "tokenizers",
    },
}
# What only functions may import: extras of the installation, which most commands do without.
LAZY = {
    "compiler": set(),
    "passes": set(),
    "runtime": set(),
    "models": {"torch", "transformers", "gguf", "safetensors"},
}
# What the functions of a single module may import beside that.
LAZY_OF_MODULE = {
    "runtime/sessions.py": {"onnxruntime"},
    "runtime/cluster.py": {"ray"},
    "compiler/sweep/plot.py": {"matplotlib"},
    "compiler/data/images.py": {"PIL"},
    "compiler/data/chat.py": {"jinja2"},
    "compiler/measure/tasks/generated.py": {"reasoning_gym"},
    "compiler/results/sheet.py": {"pandas"},
}


def _within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(root: Path) -> list[str]:
    """`path:line imports module` for every import that breaks the rule."""
    found = []
    for path in sorted(path for layer in LAYERS for path in (root / layer).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        layer = name.split("/")[0]
        lazy = LAZY[layer] | LAZY_OF_MODULE.get(name, set())
        for line, module, inside in imports(ast.parse(path.read_text())):
            allowed = ALLOWED[layer] | (lazy if inside else set())
            if module.split(".")[0] not in sys.stdlib_module_names and not _within(module, allowed):
                found.append(f"{name}:{line} imports {module}")
    return found


def test_imports_point_one_way() -> None:
    assert sum(1 for layer in LAYERS for _ in (ROOT / layer).rglob("*.py")) > 50, "the walk sees the sources"
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "module"),
    [
        ("passes/bad.py", "from qcompile.compiler import recipe", "qcompile.compiler.recipe"),
        ("passes/bad.py", "import qcompile.runtime.sessions", "qcompile.runtime.sessions"),
        ("passes/formats/bad.py", "def f():\n    import onnxruntime", "onnxruntime"),
        ("passes/bad.py", "from . import spec", "."),
        ("passes/bad.py", "from passes import spec", "passes"),
        ("runtime/bad.py", "def f():\n    import onnxruntime", "onnxruntime"),
        ("runtime/sessions.py", "import onnxruntime", "onnxruntime"),
        ("runtime/bad.py", "from qcompile.passes import affine", "qcompile.passes.affine"),
        ("runtime/bad.py", "from qcompile.passes.errors_of_mine import X", "qcompile.passes.errors_of_mine"),
        ("models/bad.py", "if True:\n    import torch", "torch"),
        ("models/bad.py", "class A:\n    from transformers.models import bert", "transformers.models"),
        ("models/bad.py", "from qcompile.passes.spec import QuantSpec", "qcompile.passes.spec"),
        ("compiler/bad.py", "def f():\n    import torch", "torch"),
        ("compiler/bad.py", "import onnxruntime as ort", "onnxruntime"),
        ("compiler/bad.py", "def f():\n    import matplotlib", "matplotlib"),
        ("compiler/sweep/plot.py", "from matplotlib.figure import Figure", "matplotlib.figure"),
    ],
)
def test_the_walk_finds_planted_violations(tmp_path, path, code, module) -> None:
    for layer in LAYERS:
        (tmp_path / layer / "formats").mkdir(parents=True)
    (tmp_path / "passes" / "good.py").write_text("import numpy as np\nfrom qcompile.passes import spec\n")
    (tmp_path / "compiler" / "sweep").mkdir()
    (tmp_path / "compiler" / "sweep" / "plot.py").write_text("def f():\n    from matplotlib.figure import Figure\n")
    (tmp_path / "models" / "good.py").write_text("from qcompile.passes import errors\ndef f():\n    import torch\n")
    assert violations(tmp_path) == []
    (tmp_path / path).write_text(code + "\n")
    (found,) = violations(tmp_path)
    assert found == f"{path}:{1 + code.count(chr(10))} imports {module}"


# Modules that must stay out, and (Linux) shared libraries, among them what a CUDA build of ONNX Runtime would load.
_PROBE = """
import json, pathlib, sys
maps = pathlib.Path("/proc/self/maps")
libraries = {line.split("/")[-1] for line in maps.read_text().split() if ".so" in line} if maps.exists() else set()
frameworks = ("torch", "transformers", "onnxruntime", "tensorflow", "matplotlib", "onnx")
heavy = [name for name in frameworks if name in sys.modules]
heavy += sorted(name for name in libraries if name.startswith(("libcu", "libnv", "libonnxruntime", "libtorch")))
print(json.dumps(heavy))
"""


def _loaded(code: str) -> list[str]:
    """What of the above a fresh interpreter has loaded after running `code`."""
    done = subprocess.run([sys.executable, "-c", code + "\n" + _PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_every_module_loads_no_framework() -> None:
    files = [path.relative_to(ROOT).with_suffix("") for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    modules = sorted("qcompile." + ".".join(file.parts).removesuffix(".__init__") for file in files)
    modules[modules.index("qcompile.compiler.api.qcompile")] = "qcompile"  # as pyproject.toml has it
    assert {"qcompile", "qcompile.compiler", "qcompile.compiler.pipeline", "qcompile.runtime.sessions"} <= set(modules)
    assert _loaded("\n".join(f"import {module}" for module in modules)) == ["onnx"]


def test_the_command_line_starts_light() -> None:
    assert _loaded("import qcompile.compiler.cli") == []


def test_reading_a_model_needs_no_onnxscript() -> None:
    """It takes longer to load than a decoder: bodies of operators are made when one is put into a graph."""
    code = "import sys; import qcompile.compiler.files.load, qcompile.compiler.data.inputs, qcompile.runtime.sessions"
    code += "\nprint('onnxscript' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_probe_sees_a_loaded_runtime() -> None:
    assert "onnxruntime" in _loaded("import onnxruntime")


# --- the driver and the passes ----------------------------------------------------------------------------------------

# A target of a recipe has the name of a pass, and SVG turns text by that of another one.
ALSO_WORDS = {"compiler/recipe.py": set(TARGETS), "compiler/report/chart.py": {"rotate"}}


def named_passes(root: Path) -> list[str]:
    """`path:line names pass` for every pass that the driver knows by its class or its name.

    The table (passes/table.py) is where names become classes; what follows is asked of what passes declare. Docstrings
    are for people, and so are help texts and examples of the command line.
    """
    kinds = list(PASSES.own())
    names, classes = ({getattr(kind, which) for kind in kinds} for which in ("name", "__name__"))
    modules, found = {kind.__module__ for kind in kinds}, []
    for path in sorted((root / "compiler").rglob("*.py")):
        place = path.relative_to(root).as_posix()
        words = names - ALSO_WORDS.get(place, set())
        spoken = set() if place.startswith("compiler/commands/") or place == "compiler/cli.py" else words
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(own.value) for own in ast.walk(tree) if isinstance(own, ast.Expr)}
        for node in ast.walk(tree):
            told: set[str] = set()
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                told = set(re.findall("[a-z_]+(?:-[a-z_]+)*", node.value)) & spoken  # --kv-cache is another word
            elif isinstance(node, ast.ImportFrom):
                told = {node.module or ""} & modules | {own.name for own in node.names} & classes
            elif isinstance(node, ast.Import):
                told = {own.name for own in node.names} & modules
            elif isinstance(node, ast.Attribute):
                told = {node.attr} & classes
            found += [f"{place}:{node.lineno} names {own}" for own in sorted(told)]  # type: ignore[attr-defined]
    return found


def test_the_driver_names_no_pass() -> None:
    assert named_passes(ROOT) == []


@pytest.mark.parametrize(
    ("path", "code", "named"),
    [
        ("compiler/walk/bad.py", "from qcompile.passes.pack import Pack", ["Pack", "qcompile.passes.pack"]),
        ("compiler/commands/bad.py", "from qcompile.passes.prepare import Prepare", ["Prepare"]),
        ("compiler/bad.py", "import qcompile.passes.qdq.qdq", ["qcompile.passes.qdq.qdq"]),
        ("compiler/mixed/bad.py", "x = table.Dynamic", ["Dynamic"]),
        ("compiler/bad.py", "x = name in ('qdq', 'other')", ["qdq"]),
        ("compiler/report/bad.py", "x = f'add {y} or dynamic to it'", ["dynamic"]),
        ("compiler/report/bad.py", "x = 'smooth,bias_correction'", ["bias_correction", "smooth"]),
        ("compiler/recipe.py", "T = ('qcompile', 'qdq')\nx = 'pack'", ["pack"]),
        ("compiler/good.py", "x = 'packed'\ndef f():\n    'What pack does.'", []),
        ("compiler/commands/good.py", "HELP = 'smooth,pack'", []),
    ],
)
def test_planted_names_are_found(tmp_path: Path, path: str, code: str, named: list[str]) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(code + "\n", encoding="utf-8")
    assert [told.split()[-1] for told in named_passes(tmp_path)] == named


# --- the rooms of compiler/ -------------------------------------------------------------------------------------------


def test_rooms_stand_on_floors_and_the_picture_of_them_is_true() -> None:
    """Few enough to know, none importing upwards, and docs/architecture.md has the table that `rooms.py` prints."""
    assert 10 < len(rooms()) <= 20
    assert table() in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_rooms_that_import_each_other_are_told(tmp_path: Path) -> None:
    for room, code in {
        "data": "from qcompile.compiler.files.load import load_model",
        "files": "def f():\n    from qcompile.compiler import walk",
        "walk": "import qcompile.compiler.data.feeds\nfrom qcompile.compiler.walk import segments",
        "recipe": "from qcompile.compiler import Calibration",
    }.items():
        (tmp_path / "compiler" / room).mkdir(parents=True)
        (tmp_path / "compiler" / room / "own.py").write_text(code + "\n")
    assert rooms(tmp_path) == {"data": {"files"}, "files": {"walk"}, "walk": {"data"}, "recipe": set()}
    with pytest.raises(ValueError, match="rooms that import each other: data, files, walk"):
        floors(rooms(tmp_path))
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}

"""Keeps the layers honest: imports point downwards, heavy libraries stay where they belong."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "nf_pipeline"

# A package's entry stands for all its modules; the longest matching name counts.
LEVELS = {
    "nf_pipeline.units": 0,
    "nf_pipeline.errors": 0,
    "nf_pipeline.config": 0,
    "nf_pipeline.documents": 0,
    "nf_pipeline.dtypes": 0,
    "nf_pipeline.events": 0,
    "nf_pipeline.plans": 0,
    "nf_pipeline.samples": 0,
    "nf_pipeline.run_uri": 0,
    "nf_pipeline.host": 0,
    "nf_pipeline.gang": 0,
    "nf_pipeline.gpus": 0,
    "nf_pipeline.worker_resources": 0,
    "nf_pipeline.trust": 0,
    "nf_pipeline.redact": 0,
    "nf_pipeline.near_names": 0,
    "nf_pipeline.retry": 1,
    "nf_pipeline.core": 1,
    "nf_pipeline.storage": 1,
    "nf_pipeline.model_files": 2,
    "nf_pipeline.data": 2,
    "nf_pipeline.worker": 2,
    "nf_pipeline.executors": 2,
    "nf_pipeline.driver": 3,
    "nf_pipeline.bench": 4,
    "nf_pipeline.cli": 5,
    "nf_pipeline.__main__": 5,
    "nf_pipeline": 5,  # the facade: `from nf_pipeline import train`
}

# Library -> the only places that may import it; "lazy" ones only inside a function.
ONLY_IN = {
    "ray": (
        "nf_pipeline.executors.ray_cluster",
        "nf_pipeline.executors.ray_connection",
        "nf_pipeline.executors.ray_errors",
        "nf_pipeline.executors.ray_jobs",
        "nf_pipeline.executors.ray_metrics",
        "nf_pipeline.data.activation_shards",
    ),
    "s3fs": ("nf_pipeline.storage.s3",),
    "click": ("nf_pipeline.cli",),
    "rich": ("nf_pipeline.cli",),
    "matplotlib": ("nf_pipeline.bench.plots",),
    "timm": ("nf_pipeline.core.library_models",),
}
LAZY = {"s3fs", "matplotlib", "timm"}

# Package -> what it must do without.
WITHOUT = {
    "nf_pipeline.core": {"pyarrow", "s3fs", "fsspec", "ray", "nf_pipeline.storage"},
    "nf_pipeline.storage": {"torch", "torchvision", "ray", "nf_pipeline.core"},
    "nf_pipeline.executors": {"torch", "nf_pipeline.worker", "nf_pipeline.core", "nf_pipeline.storage"},
    "nf_pipeline.cli": {"torch", "ray"},
}

BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "manager"}
CODE_LOADERS = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm"),
    *("yaml", "jsonpickle", "multiprocessing", "runpy", "code", "codeop"),
}
CODE_RUNNING = {"eval", "exec", "compile", "__import__"}
CODE_LOADING = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.package"),
    *("pd.read_pickle", "pandas.read_pickle", "pd.eval", "pandas.eval", "np.lib.format", "pa.serialization"),
    *("pa.PyExtensionType", "pa.register_extension_type", "pa.UnknownExtensionType"),
    *("builtins.eval", "builtins.exec", "os.system", "os.popen"),
    "importlib.util.spec_from_file_location",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text(encoding="utf8") for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def level_of(module: str) -> int | None:
    """Returns the level of the longest entry that covers a module; None for a module nobody placed."""
    covering = [name for name in LEVELS if name != PACKAGE and is_in(module, name)]
    if module != PACKAGE and not covering:
        return None
    return LEVELS[max(covering, key=len, default=PACKAGE)]


def imports_of(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Yields every imported module's full name and whether the import stands inside a function."""
    yield from _imports_below(ast.parse(source), module, inside=False)


def _imports_below(node: ast.AST, module: str, inside: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((name, inside) for name in _names_from(child, module))
        deeper = inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports_below(child, module, deeper)


def _names_from(node: ast.ImportFrom, module: str) -> list[str]:
    base = node.module or ""
    if node.level:
        parents = module.split(".")
        above = parents[: len(parents) - node.level + _is_package(module)]
        base = ".".join([*above, base] if base else above)
    # `from a import b` may name the module a.b.
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in node.names]


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").exists()


def upward_imports(module: str, source: str) -> list[str]:
    level = level_of(module)
    if level is None:
        return [f"{module} has no level: place it in LEVELS"]
    found = []
    for name, _ in imports_of(module, source):
        if is_in(name, PACKAGE) and (level_of(name) is None or level_of(name) > level):
            found.append(f"{module} (level {level}) imports {name} (level {level_of(name)})")
    return found


def misplaced_libraries(module: str, source: str) -> list[str]:
    found = []
    for name, inside in imports_of(module, source):
        library = name.partition(".")[0]
        if library in ONLY_IN and not any(is_in(module, place) for place in ONLY_IN[library]):
            found.append(f"{module} imports {name}; only {' and '.join(ONLY_IN[library])} may")
        elif library in LAZY and not inside:
            found.append(f"{module} imports {name} at its top; import it inside the function that needs it")
        for package, banned in WITHOUT.items():
            if is_in(module, package) and any(is_in(name, other) for other in banned):
                found.append(f"{module} imports {name}; {package} does without")
    return found


def prints(module: str, source: str) -> list[str]:
    if is_in(module, "nf_pipeline.cli"):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{module}:{call.lineno} prints"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


def code_loaders(module: str, source: str) -> list[str]:
    """Finds what could execute code that a store holds."""
    found = [
        f"{module} imports {name}" for name, _ in imports_of(module, source) if name.partition(".")[0] in CODE_LOADERS
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CODE_LOADING:
            found.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [f"{module} imports torch.{a.name}" for a in node.names if a.name in {"load", "save"}]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in CODE_RUNNING:
            found.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{module}:{node.value.lineno} allows pickle")
    return found


def banned_names(module: str, source: str) -> list[str]:
    found = [f"{module} is named {part}" for part in module.split(".") if set(part.split("_")) & BANNED_NAMES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.lower().endswith(tuple(BANNED_NAMES)):
            found.append(f"{module}:{node.lineno} names a class {node.name}")
    return found


CHECKS = (upward_imports, misplaced_libraries, prints, code_loaders, banned_names)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_package_breaks_no_rule(check):
    assert SOURCES, f"no sources below {ROOT / PACKAGE}"
    assert [problem for module, source in SOURCES.items() for problem in check(module, source)] == []


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (upward_imports, "nf_pipeline.core.layers", "from nf_pipeline.worker.feed import Feed"),
        (upward_imports, "nf_pipeline.core.layers", "def f():\n    import nf_pipeline.driver.run"),
        (upward_imports, "nf_pipeline.worker.feed", "from nf_pipeline import train"),
        (upward_imports, "nf_pipeline.config", "from nf_pipeline import retry"),
        (upward_imports, "nf_pipeline.worker.feed", "from ..driver import run"),
        (upward_imports, "nf_pipeline.stray", ""),
        (misplaced_libraries, "nf_pipeline.worker.feed", "import ray"),
        (misplaced_libraries, "nf_pipeline.driver.run", "from ray.exceptions import RayError"),
        (misplaced_libraries, "nf_pipeline.storage.store", "def f():\n    import s3fs"),
        (misplaced_libraries, "nf_pipeline.storage.s3", "import s3fs"),
        (misplaced_libraries, "nf_pipeline.storage.shards", "import torch"),
        (misplaced_libraries, "nf_pipeline.core.layers", "import pyarrow.parquet as pq"),
        (prints, "nf_pipeline.driver.run", "def f():\n    print('x')"),
        (code_loaders, "nf_pipeline.worker.checkpoint", "import pickle"),
        (code_loaders, "nf_pipeline.worker.checkpoint", "import torch\nx = torch.load('f')"),
        (code_loaders, "nf_pipeline.worker.checkpoint", "from torch import load"),
        (code_loaders, "nf_pipeline.storage.shards", "import numpy as np\nnp.load('f', allow_pickle=True)"),
        (code_loaders, "nf_pipeline.config", "eval('1')"),
        (code_loaders, "nf_pipeline.config", "import yaml"),
        (code_loaders, "nf_pipeline.data.parquet", "import pandas as pd\npd.read_pickle('f')"),
        (code_loaders, "nf_pipeline.data.parquet", "import pyarrow as pa\npa.register_extension_type(T())"),
        (code_loaders, "nf_pipeline.model_files", "from multiprocessing import Pool"),
        (banned_names, "nf_pipeline.core.tensor_utils", ""),
        (banned_names, "nf_pipeline.driver.run", "class RunManager:\n    pass"),
    ],
)
def test_check_finds_what_it_forbids(check, module, source):
    assert len(check(module, source)) == 1


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (upward_imports, "nf_pipeline.worker.feed", "from nf_pipeline.core.layers import cut"),
        (misplaced_libraries, "nf_pipeline.storage.s3", "def f():\n    import s3fs"),
        (misplaced_libraries, "nf_pipeline.executors.ray_cluster", "import ray"),
        (prints, "nf_pipeline.cli.app", "print('x')"),
        (code_loaders, "nf_pipeline.storage.shards", "import numpy as np\nnp.load('f', allow_pickle=False)"),
        (banned_names, "nf_pipeline.driver.run", "class RunLayout:\n    pass"),
    ],
)
def test_check_passes_what_it_allows(check, module, source):
    assert check(module, source) == []


def libraries_loaded_by(code: str) -> set[str]:
    """Runs code in a fresh interpreter and returns the top-level names of all modules loaded at its end."""
    names = "sorted({module.partition('.')[0] for module in sys.modules})"
    ending = f"import json, sys; sys.stderr.write('\\n' + json.dumps({names}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


HEAVY = {"torch", "torchvision", "ray", "pyarrow", "numpy", "s3fs", "botocore"}


@pytest.mark.parametrize(
    "code",
    [
        "import nf_pipeline",
        "import nf_pipeline.cli",
        "from nf_pipeline import RunConfig",
        "from nf_pipeline.cli import main; assert main(['--help']) == 0",
        "from nf_pipeline.cli import main; assert main(['train', '--help']) == 0",
    ],
)
def test_starting_up_loads_no_heavy_library(code):
    assert libraries_loaded_by(code) & HEAVY == set()


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("nf_pipeline.storage", {"torch", "torchvision", "ray", "s3fs", "botocore"}),
        ("nf_pipeline.core", {"pyarrow", "ray", "s3fs", "botocore"}),
        ("nf_pipeline.worker", {"ray", "s3fs", "botocore"}),
    ],
)
def test_importing_every_module_of_a_package_stays_clear_of(package, forbidden):
    modules = [module for module in SOURCES if is_in(module, package)]
    assert modules, f"no modules in {package}"
    loaded = libraries_loaded_by("\n".join(f"import {module}" for module in modules))
    assert loaded & forbidden == set()

"""Two tables, enforced: where a line may live, and which way imports point. Read off the syntax trees."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fluxserve.families import registry

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fluxserve"
CODE = sorted(
    file
    for folder in (
        "fluxserve",
        "model_repository",
        "export/src",
        "client/src",
        "gateway/src",
        "testing",
        "benchmarks",
        "training",
    )
    for file in (ROOT / folder).rglob("*.py")
)
LIBRARY = [file for file in CODE if file.is_relative_to(PACKAGE) or "model_repository" in file.parts]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_MODEL_LINES = 40

# What a module may name, and where it lives. Paths are prefixes, relative to the root.
IMPORTS = {
    "triton_python_backend_utils": ("fluxserve/serving/", "model_repository/"),
    "c_python_backend_utils": ("fluxserve/serving/shared_memory.py",),
    "tensorrt": ("fluxserve/engines/tensorrt_library.py",),
    "tensorrt_rtx": ("fluxserve/engines/tensorrt_library.py",),
    "onnxruntime": ("fluxserve/engines/onnxruntime.py",),
    "triton": ("fluxserve/kernels/", "benchmarks/kernels.py"),
    "cudnn": ("fluxserve/kernels/",),
    # how an engine's FP8 numbers come about is read in one file
    "fluxserve.kernels.fp8.E4M3_MAX": ("fluxserve/kernels/", "fluxserve/engines/fused/scales.py", "benchmarks/"),
    "fluxserve.kernels.fp8.quantise_rows": ("fluxserve/kernels/", "fluxserve/engines/fused/scales.py", "benchmarks/"),
    "modelopt": ("export/",),
    "c2pa": ("fluxserve/media/signing.py", "client/src/fluxserve_client/inspection.py"),
    "cryptography": ("fluxserve/media/signing.py",),
    "diffusers": (
        "fluxserve/engines/torch_eager.py",
        "fluxserve/families/",
        "export/",
        "training/",
        "benchmarks/",
        "testing/",
    ),
    "fluxserve_client": ("fluxserve/cli/", "client/", "gateway/", "benchmarks/"),
    "fluxserve_export": ("export/", "benchmarks/", "training/"),
    "tests": (),
    "benchmarks": ("benchmarks/",),
    "training": ("training/", "benchmarks/", "testing/"),
    # HTTP's server side, keys and OpenAI's fields
    "fastapi": ("gateway/",),
    "starlette": ("gateway/",),
    "uvicorn": ("gateway/",),
    "pydantic": ("gateway/",),
    "prometheus_client": ("gateway/",),
    "sqlite3": ("gateway/",),
    "sqlalchemy": ("gateway/src/fluxserve_gateway/jobs/",),
    "obstore": ("gateway/src/fluxserve_gateway/jobs/",),
    "fluxserve_gateway": ("gateway/",),
    "opentelemetry": ("gateway/src/fluxserve_gateway/tracing.py",),
    "gradio": ("gateway/src/fluxserve_gateway/page/",),
    "pickle": (),
}
# Engines and tools that are written for a family; every other module knows it through families/base.py.
WRITTEN_FOR = {"flux": ("fluxserve/engines/fused/", "export/", "benchmarks/", "testing/")}
CLIENT_CLI = ("client/src/fluxserve_client/cli.py", "client/src/fluxserve_client/show.py")
GATEWAY_CLI = "gateway/src/fluxserve_gateway/cli.py"
CALLS = {
    "print": ("fluxserve/cli/main.py", *CLIENT_CLI, GATEWAY_CLI, "benchmarks/", "training/", "testing/", "export/"),
}
ATTRIBUTES = {
    "environ": (
        "fluxserve/settings.py",
        "benchmarks/",
        "client/src/fluxserve_client/cli.py",
        "gateway/src/fluxserve_gateway/page/__init__.py",
    ),
    "getenv": ("fluxserve/settings.py",),
    "CUDAGraph": ("fluxserve/engines/", "benchmarks/"),
}
# Numbers of the FLUX models, which only the spec may write: its tables, and the defaults of their parts.
CONSTANTS = {0.3611, 0.1159, 1.15, 3072, 4096, 768, 15360, 12288, 7680}

MODEL_TABLES = (
    *(f"fluxserve/families/{name}/{part}.py" for name in registry.NAMES for part in ("models", "parts")),
    *("fluxserve/sampling/schedule.py", "fluxserve/spec.py"),  # defaults of diffusers' scheduler, and of limits
)

# Imports point one way: a module may import from its own layer only where the layer is a package, and from lower ones.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("supervisor",),
    ("serving",),
    ("model",),
    ("pipeline",),
    ("device", "source"),
    ("text", "engines", "media.png.gpu"),
    ("kernels",),
    ("settings", "folders.artifact"),
    ("folders.checkpoint",),
    ("families",),
    ("request",),
    ("media", "sampling", "previews"),
    ("folders",),
    ("engine", "inflight", "job"),
    ("spec", "contract", "shared_file"),
    ("errors", "process", "console"),
)
ENGINES_MAY_IMPORT = {"engine", "spec", "errors", "kernels", "folders", "families", "engines"}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(rooms: tuple[str, ...], found: Iterator[Path]) -> list[str]:
    return sorted({name_of(f) for f in found if not name_of(f).startswith(rooms)})


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_live_in_their_room(module: str) -> None:
    found = (f for f in CODE for name in imported(f) if name == module or name.startswith(f"{module}."))
    assert offenders(IMPORTS[module], found) == []


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_family_is_known_to_its_own_folder(name: str) -> None:
    """And to engines and tools written for it; to other families it is not, and to the registry by its name alone."""
    found = (f for f in CODE for module in imported(f) if f"{module}.".startswith(f"fluxserve.families.{name}."))
    assert offenders((f"fluxserve/families/{name}/", *WRITTEN_FOR.get(name, ())), found) == []


def test_what_families_share_knows_none() -> None:
    shared = (f for f in CODE if name_of(f).startswith(("fluxserve/families/shared/", "fluxserve/families/base.py")))
    known = tuple(f"fluxserve.families.{name}" for name in registry.NAMES)
    assert [name_of(f) for f in shared for module in imported(f) if module.startswith(known)] == []


@pytest.mark.parametrize("function", CALLS)
def test_calls_live_in_their_room(function: str) -> None:
    calls = ((f, n.func) for f in CODE for n in ast.walk(tree(f)) if isinstance(n, ast.Call))
    found = (f for f, called in calls if isinstance(called, ast.Name) and called.id == function)
    assert offenders(CALLS[function], found) == []


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_live_in_their_room(attribute: str) -> None:
    found = (f for f in CODE for n in ast.walk(tree(f)) if isinstance(n, ast.Attribute) and n.attr == attribute)
    assert offenders(ATTRIBUTES[attribute], found) == []


def test_model_constants_live_in_spec() -> None:
    found = (
        f
        for f in LIBRARY
        for n in ast.walk(tree(f))
        if isinstance(n, ast.Constant) and type(n.value) in (int, float)
        if n.value in CONSTANTS
    )
    assert offenders(MODEL_TABLES, found) == []


def test_tensor_names_come_from_the_contract() -> None:
    """Only the contract and the code of the model that fills a tensor name it."""
    from fluxserve import contract

    private = {t.name for t in (*contract.PREPARE.outputs, *contract.GENERATE.outputs)} - {"job", "images", "seeds"}
    found = (f for f in LIBRARY for n in ast.walk(tree(f)) if isinstance(n, ast.Constant) and n.value in private)
    assert offenders(("fluxserve/contract.py", "fluxserve/inflight.py", "fluxserve/serving/"), found) == []


def layer_of(module: str) -> int:
    """Of a module without the package's name, by the longest name in the table that it is or lies below."""
    known = {name: index for index, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    return next(known[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in known)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_imports_point_one_way(file: Path) -> None:
    own = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if own == "__init__":
        return
    for name in imported(file):
        other = name.removeprefix("fluxserve.")
        if not name.startswith("fluxserve.") or other == "__version__":
            continue
        if own.startswith("engines."):
            assert other.split(".")[0] in ENGINES_MAY_IMPORT, f"an engine imports {name}"
        if other.split(".")[0] != own.split(".")[0] or layer_of(other) != layer_of(own):
            same_room = other == own.split(".")[0]  # `from fluxserve.folders import files` names the package as well
            assert same_room or layer_of(other) > layer_of(own), f"{own} imports {name}"


def test_every_module_has_a_layer() -> None:
    known = {name.split(".")[0] for names in LAYERS for name in names}
    assert {f.relative_to(PACKAGE).with_suffix("").parts[0] for f in PACKAGE.rglob("*.py")} - {"__init__"} == known


@pytest.mark.parametrize("file", CODE, ids=name_of)
def test_files_and_functions_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            length = (node.end_lineno or node.lineno) - first.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"
    if name_of(file).startswith("model_repository/"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < MAX_MODEL_LINES


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=name_of)
def test_tests_are_as_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("file", [f for f in CODE if f.is_relative_to(PACKAGE)], ids=name_of)
def test_every_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(tree(file))


def test_the_loop_never_waits_for_the_host() -> None:
    """No .item(), .tolist(), .cpu() or .numpy() between the first launch of a step and the next."""
    called = {
        "pipeline.py": ("tell", "any_wanted", "show", "glimpse", "partial", "_clean"),
        "sampling/loop.py": ("__iter__", "clean"),
        "sampling/glimpses.py": ("project",),
        "sampling/solvers.py": ("model_input", "step_", "clean"),
        "sampling/guidance.py": ("write", "join"),
        "engine.py": ("run_step",),
        "engines/fused/transformer.py": ("run_step", "_modulated", "_fill"),
    }
    found = [
        ast.unparse(node)
        for file, names in called.items()
        for node in ast.walk(tree(PACKAGE / file))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    assert len(found) >= sum(map(len, called.values()))
    source = "\n".join(found)
    assert not re.search(r"\.(item|tolist|cpu|numpy|synchronize)\(|float\(|int\(", source)


def test_the_gateway_knows_the_client_alone() -> None:
    """It runs where neither torch nor Triton's server is."""
    found = {name.split(".")[0] for f in CODE if name_of(f).startswith("gateway/") for name in imported(f)}
    assert "fluxserve_client" in found
    assert not found & {"fluxserve", "export", "benchmarks", "torch", "numpy", "tritonclient"}


def test_the_rooms_are_real() -> None:
    """A rule about a name that nobody uses would hold for ever."""
    used = {name.split(".")[0] for f in CODE for name in imported(f)}
    assert {"triton_python_backend_utils", "diffusers", "fluxserve_client", "fastapi", "sqlite3"} <= used

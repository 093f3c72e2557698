"""The architecture, enforced: who may import whom, and what the library never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "qlformat"
COMMAND = ROOT / "cli" / "qlf"

# From low to high. A module imports only from lower rows; a new one is added to the lowest row its imports allow.
LEVELS = (
    {
        "_tables",
        "architectures",
        "backends",
        "calibration",
        "calibration.feedback",
        "calibration.settings",
        "cards.snippets",
        "conversions",
        "errors",
        "file_names",
        "finetune",
        "finetune.attention",
        "finetune.low_rank",
        "finetune.packing",
        "finetune.recipes",
        "first_touch",
        "free_memory",
        "hashing",
        "hub",
        "hub_server",
        "hub_server.blobs",
        "hub_server.card",
        "hub_server.card_metadata",
        "hub_server.git_ids",
        "hub_server.ignoring",
        "hub_server.limits",
        "hub_server.page_templates",
        "hub_server.refusals",
        "merge",
        "merge.checksum",
        "merge.figures",
        "progress",
        "quality",
        "rules",
        "workers",
    },
    {
        "backends.cuda_program",
        "calibration.moments",
        "calibration.own_text",
        "calibration.texts",
        "cards.document",
        "causal_models",
        "codebook",
        "download",
        "finetune.metrics",
        "finetune.rows",
        "hub.refusals",
        "hub_server.applying",
        "hub_server.database",
        "hub_server.names",
        "hub_server.s3_blobs",
        "journal",
        "layout",
        "merge.changes",
        "merge.combining",
        "native_arrays",
        "native_library",
        "quality.windows",
        "quant_storage",
        "selection",
        "staging",
    },
    {
        "backends.cuda_launch",
        "cards.content",
        "finetune.files",
        "finetune.formats",
        "finetune.checkpointing",
        "finetune.hub_rows",
        "finetune.options",
        "finetune.processes",
        "finetune.rendering",
        "hub_server.index",
        "manifest",
        "merge.options",
        "native",
        "native_merge",
        "native_sha256",
        "reference",
        "training_memory",
    },
    {
        "backends.torch_ref",
        "cards.picture",
        "codec",
        "finetune.layers",
        "finetune.masking",
        "finetune.placement",
        "finetune.sft",
        "hub_server.browsing",
        "hub_server.changes",
        "hub_server.descent",
        "hub_server.describing",
        "hub_server.tokens",
        "repository",
        "shards",
    },
    {
        "backends.cpu",
        "backends.cuda",
        "calibration.scales",
        "merge.direct_shard",
        "shard_hashes",
        "finetune.dataset",
        "torch_file",
        "weights",
        "hub_server.xet",
        "hub_server.browser_sessions",
        "hub_server.lineage",
        "hub_server.page_parts",
    },
    {"lazy", "ops", "quality.inputs", "source", "stored", "hub_server.service"},
    {
        "checkpoint",
        "consistency",
        "hub.client",
        "mapped",
        "plan",
        "remote",
        "hub_server.asking",
        "hub_server.collecting",
    },
    {
        "adapter",
        "carried",
        "casting",
        "estimate",
        "quality.sides",
        "recompute",
        "skeleton",
        "tensor_stream",
        "hub_server.api",
        "hub_server.committing",
        "hub_server.downloads",
        "hub_server.page_views",
        "hub_server.preupload",
        "hub_server.pull_requests",
        "hub_server.uploads",
        "hub_server.xet_access",
    },
    {
        "calibration.activations",
        "cards.metadata",
        "decoder",
        "finetune.fixed_part",
        "hub.contents",
        "hub.transfer",
        "hub_server.app",
        "merge.adapter_files",
        "merge.arithmetic",
        "merge.base",
        "pins",
        "quality.comparison",
    },
    {
        "adapter_search",
        "calibration.engine",
        "cards.adapter",
        "device_loader",
        "finetune.initialization",
        "hub.fetch",
        "hub.plan",
        "hub_server.pages",
        "merge.combined_adapter",
        "merge.matching",
        "merge.merged",
        "merge.planning",
        "numpy",
        "quality.picture",
    },
    {"merge.compatibility", "merge.stream", "hub_server.server"},
    {"merge.run"},
    {"converter", "exporter", "loader", "summary", "verifier"},  # the verbs: none imports another
    {"adapter_verifier", "cards.base", "hub.headers", "model_loader"},
    {"cards.merged", "hub.soundness"},
    {"cards.writer", "hub.examination", "hub.pull"},
    {"cards", "hub.sending"},
    {"hub.upload"},
    {"hub.push"},
    {"finetune.base", "generator", "quality.models"},
    {"finetune.budget", "quality.scoring"},
    {"finetune.session", "quality.evaluation"},
    {"finetune.artifacts", "finetune.preparation", "finetune.preview", "merge.retention"},
    {"finetune.trainer", "merge.merger"},
)
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}

# Importing one of these costs seconds. They are imported inside the function that needs them.
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "boto3",
    "botocore",
    "cuda",
    "datasets",
    "huggingface_hub",
    "peft",
    "pyarrow",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
    "trl",
}

# Modules about torch tensors import torch like any other module would. Nothing else imports these when it is imported.
TORCH = {"backends.cpu", "backends.cuda", "backends.cuda_launch", "backends.torch_ref", "device_loader", "ops"}

SOURCES = sorted([*LIBRARY.rglob("*.py"), *COMMAND.rglob("*.py")])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def direct_imports(node: ast.AST) -> Iterator[str]:
    """What this one statement imports; `from package import name` gives package.name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every module imported anywhere in the tree."""
    for node in ast.walk(tree):
        yield from direct_imports(node)


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending.extend(ast.iter_child_nodes(node))


def module_of(path: Path) -> str:
    """The module's name below qlformat: `backends.cpu` for qlformat/backends/cpu.py, `backends` for its __init__."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def path_of(module: str) -> Path:
    path = LIBRARY / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def known_module(name: str) -> str:
    """The module that `qlformat.backends.cpu.dequantize` is in: the longest name that LEVELS knows, or ""."""
    parts = name.split(".")[1:]
    return next((found for end in range(len(parts), 0, -1) if (found := ".".join(parts[:end])) in LEVEL), "")


def upward_imports(module: str, tree: ast.AST) -> list[str]:
    """The qlformat modules that `module` imports from its own level or above."""
    targets = {known_module(name) for name in imported_names(tree) if name.startswith("qlformat.")} - {""}
    return sorted(target for target in targets if LEVEL[target] >= LEVEL[module])


def test_every_module_has_a_level() -> None:
    modules = {module_of(path) for path in LIBRARY.rglob("*.py")} - {""}
    assert not modules - set(LEVEL), "add these modules to LEVELS in this file"
    assert not set(LEVEL) - modules, "LEVELS names modules that are gone"


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_go_to_a_lower_level(module: str) -> None:
    upward = upward_imports(module, parse(path_of(module)))
    assert not upward, f"{module} is at level {LEVEL[module]} and imports {upward}"


def test_an_upward_import_is_found() -> None:
    assert upward_imports("layout", ast.parse("def f():\n    from qlformat.verifier import verify")) == ["verifier"]
    assert upward_imports("exporter", ast.parse("from qlformat import verifier")) == ["verifier"]
    assert upward_imports("codec", ast.parse("from qlformat.backends import cpu")) == ["backends.cpu"]
    assert upward_imports("backends.torch_ref", ast.parse("import qlformat.backends.cpu")) == ["backends.cpu"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_habits(path: Path) -> None:
    tree = parse(path)
    names = set(imported_names(tree))
    if path.is_relative_to(LIBRARY):
        assert not [name for name in names if name.split(".")[0] == "qlf"], "the library imports the command line"
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"line {node.lineno}: python -O drops an assert; raise an error"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "sys.exit", "exit", "quit", "os._exit"}, f"line {node.lineno}: {called}"
    heavy = {name.split(".")[0] for node in run_at_import(tree) for name in direct_imports(node)} & HEAVY
    if path.is_relative_to(LIBRARY) and module_of(path) in TORCH:
        heavy -= {"torch"}
    assert not heavy, f"{sorted(heavy)} would be imported by every command"


def test_nothing_heavy_is_imported_at_run_time() -> None:
    modules = [f"qlformat.{module}" for module in sorted(set(LEVEL) - TORCH)]
    modules += [f"qlf.{path.stem}" for path in sorted(COMMAND.glob("*.py")) if not path.stem.startswith("__")]
    script = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(COMMAND.parent)]!r}\n"
    done = subprocess.run([sys.executable, "-c", path + script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert {"qlformat", "qlf"} <= loaded
    assert not loaded & HEAVY


def test_an_import_that_runs_is_found() -> None:
    hidden = "if TYPE_CHECKING:\n    import a\ndef f():\n    import b\n"
    runs = "try:\n    import c\nexcept ImportError:\n    import d\nclass C:\n    import e\n"
    found = {name for node in run_at_import(ast.parse(hidden + runs)) for name in direct_imports(node)}
    assert found == {"c", "d", "e"}


def test_kernels_hold_no_python() -> None:
    """A `kernels` package in the repository root would shadow Hugging Face's and break `import transformers`."""
    assert (ROOT / "kernels" / "CMakeLists.txt").is_file()
    assert not list((ROOT / "kernels").rglob("*.py"))

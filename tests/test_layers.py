"""The borders of the design: who imports whom, whose names stand where, and which packages ship."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef, import-not-found]

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "passes", "targets", "frontends", "runtime")
DRIVER = Path("compiler/driver.py")  # the composition root
MODEL_NAMES = re.compile(
    r"(?<![a-z])(?:(?:llama|qwen|mistral|mixtral|gemma|gpt|neox|olmo|cohere|deepseek|starcoder|bloom|falcon|rwkv)(?![a-z])"
    # Both are words of compilers too: LLVM's phi instruction, an optimisation level.
    r"|(?:phi|opt)(?=[-_]?\d|for[A-Z]|config|model))",
    re.I,
)


def sources(*folders: str) -> list[Path]:
    return sorted(
        f.relative_to(ROOT) for folder in folders for f in (ROOT / folder).rglob("*.py") if "__pycache__" not in f.parts
    )


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import but those for type checkers."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module, top
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            yield from visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(tree, True)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "jisu" and len(parts) > 1 and parts[1] in ROOMS else None


def uses(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("path", sources(*ROOMS), ids=str)
def test_imports_keep_the_borders(path: Path) -> None:
    own = path.parts[0]
    allowed = {own, "compiler"}
    for module, top in imports(path):
        where = f"{path} imports {module}"
        assert module.split(".")[0] not in ROOMS, f"{where}: write jisu.{module}"
        if path == DRIVER:
            assert not (top and uses(module, "torch", "transformers", "tvm", "jisu.frontends")), (
                f"{where} when it is imported itself"
            )
            continue
        assert room(module) is None or room(module) in allowed, where
        if own in ("compiler", "passes"):
            assert not uses(module, "torch", "transformers", "tvm", "tvm_ffi"), where
        if own == "runtime":
            assert not (top and uses(module, "torch", "transformers", "tvm")), f"{where} when it is imported itself"
            assert not uses(module, "transformers", "tvm"), where
        if own != "frontends":
            assert not uses(module, "transformers", "torch.export"), where
        if own not in ("targets",):
            assert not uses(module, "tvm"), where
        if own == "compiler":
            assert not uses(module, "jisu.compiler.driver"), f"{where}: nothing below the composition root knows it"


def strings_and_names(path: Path) -> Iterator[tuple[int, str]]:
    """Identifiers and string literals, docstrings (which may cite papers) left out."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield line, node.value
        elif isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield line, node.arg


@pytest.mark.parametrize("path", sources("compiler", "passes", "targets", "runtime"), ids=str)
def test_no_model_is_named_outside_the_frontends(path: Path) -> None:
    found = [f"{path}:{line}: {text[:60]!r}" for line, text in strings_and_names(path) if MODEL_NAMES.search(text)]
    assert not found, "\n".join(found)


def test_the_search_for_model_names_bites() -> None:
    for text in ("is_llama", "Qwen3Model", "gpt_neox", "GPT2", "phi-3", "opt_125m", "OPTForCausalLM"):
        assert MODEL_NAMES.search(text), text
    for text in ("option", "graphics", "adopt", "philosophy", "blooming", "opt_level", "%5 = phi i64"):
        assert not MODEL_NAMES.search(text), text


def test_every_package_ships() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"jisu"}
    for folder in ROOMS:
        found |= {"jisu." + ".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / folder).rglob("__init__.py")}
    for f in (ROOT / "jisu").rglob("__init__.py"):
        parts = f.parent.relative_to(ROOT).parts
        if len(parts) < 2 or parts[1] not in ROOMS:
            found.add(".".join(parts))
    assert sorted(setup["packages"]) == sorted(found), (
        "pyproject.toml's list of packages is not the folders with __init__.py"
    )
    assert {f"jisu.{r}" for r in ROOMS} <= set(setup["package-dir"])
    for folder in ROOMS:
        for f in sources(folder):
            assert (ROOT / f.parent / "__init__.py").exists(), f"{f.parent} has no __init__.py"


def test_rooms_are_links_beside_the_face() -> None:
    for folder in ROOMS:
        link = ROOT / "jisu" / folder
        assert link.resolve() == (ROOT / folder).resolve()


def test_golden_files_are_all_used() -> None:
    wanted = {
        name
        for f in sources("tests")
        for name in re.findall(r'golden\(\s*"([\w-]+)"', (ROOT / f).read_text(encoding="utf-8"))
    }
    assert {f.stem for f in (ROOT / "tests" / "golden").glob("*.txt")} <= wanted

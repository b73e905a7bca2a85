"""House rules that a reader relies on: sizes, docstrings, who may know whom, nothing unpickled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "espalier"
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
PLAIN = ROOT / "plain"
ENGINE = [p for p in FILES if p.parent in (ROOT, PLAIN) and p.name != "__init__.py"]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    limit = 150 if path.parent.name == "methods" else 400
    assert lines <= limit
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_public_functions_and_classes_have_docstrings(path: Path) -> None:
    bare = [
        node.name
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_unpickled(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"torch\.load\(|import pickle|pickle\.load|allow_pickle=True|(?<![.\w])(?:eval|exec)\(",
        text,
    )


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.name)
def test_no_engine_file_names_a_method(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("espalier.methods.")]


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_methods_know_deltas_and_places_only(path: Path) -> None:
    known = r"deltas|errors|modules|places|recipes|plain\.\w+"
    if "@named_sum" in path.read_text(encoding="utf-8"):  # a sum knows its parts
        known += r"|methods\.\w+"
    names = {name for name in imported(path) if name.startswith("espalier")}
    assert all(re.fullmatch(rf"espalier\.({known})", name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_layers_do_not_look_up(path: Path) -> None:
    """The engine imports nothing of data, tasks, training and commands."""
    if path not in ENGINE or path.name in ("__main__.py", "generation.py", "doctor.py"):
        return
    above = ("espalier.data", "espalier.tasks", "espalier.training", "espalier.commands")
    assert not [name for name in imported(path) if name.startswith(above)]


def test_model_names_stand_in_the_grammar_only() -> None:
    words = re.compile(r"\b(q_proj|c_attn|self_attn|DenseReluDense|query_key_value)\b")
    knowing = [
        path.name
        for path in FILES
        if any(
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and words.search(node.value)
            for node in ast.walk(_without_docstrings(tree(path)))
        )
    ]
    assert set(knowing) <= {"grammar.py", "fused.py", "selectors.py"}  # an example in a message


def _without_docstrings(module: ast.Module) -> ast.Module:
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return module

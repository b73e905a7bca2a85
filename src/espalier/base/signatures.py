"""The decoder quickstart's task: from a function's signature to its docstring's first sentence.

Rows come from the standard library's modules that the base never read and from packages that
are installed wherever Espalier is. Source is parsed, never imported. The splits share no
top-level module, no prompt and no completion, and no completion of a row is a docstring that
the base read elsewhere.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from espalier.base.text import Document, name_bucket, python_files, read_source, source_documents
from espalier.errors import DataError

Row = dict[str, str]
SPLITS = ("test", "validation", "train")
# Dependencies of Espalier's own dependencies; no copies of standard library code among them.
_NAMES = """accelerate anyio click datasets dateutil dill filelock fsspec huggingface_hub jinja2
joblib mpmath networkx numpy packaging pandas psutil pyarrow pydantic pygments regex rich
safetensors scipy sklearn sympy tokenizers torch tqdm transformers typer yaml"""
PACKAGES = tuple(_NAMES.split())
MAX_FILES = 80
WORDS = range(3, 21)
MAX_PROMPT = 160
MAX_COMPLETION = 120


def split_of(module: str) -> str:
    """Return the split that all functions of a top-level module belong to."""
    bucket = name_bucket(module.lstrip("_"), "adaptation")
    return "test" if bucket < 20 else "validation" if bucket < 30 else "train"


def first_sentence(docstring: str) -> str | None:
    """Return the first sentence of a docstring, or None when it is not a plain one."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    match = re.match(r"[A-Z][a-z].*?[a-z)`'\"\d]\.(?=\s|$)", text)
    if not match or len(match[0]) > MAX_COMPLETION or len(match[0].split()) not in WORDS:
        return None
    sentence = match[0]
    if not sentence.isascii() or re.search(r">>>|::|\\|:\w+:`|\be\.g\.|\bi\.e\.", sentence):
        return None
    return sentence


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return `def name(arguments):` without annotations and the opening of a docstring."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f'{keyword} {node.name}({ast.unparse(arguments)}):\n    """'


def functions(text: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield the public functions and methods of a source text with their docstrings."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and node.name[0] != "_":
                yield node, docstring
        elif isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            waiting.extend(reversed(node.body))  # not into functions: those are private


def rows_of(documents: Iterable[Document]) -> Iterator[Row]:
    """Yield the rows of some documents, repeats and all."""
    for document in documents:
        for node, docstring in functions(document.text):
            completion = first_sentence(docstring)
            prompt = signature(node) if completion else ""
            if completion and len(prompt) <= MAX_PROMPT:
                yield {"prompt": prompt, "completion": completion, "module": document.module}


def package_documents(name: str) -> Iterator[Document]:
    """Read an installed package's files in an order that mixes its folders, if it is there."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    paths = [path.relative_to(root).as_posix() for path in python_files(root)]
    paths = [path for path in paths if "_vendor" not in path and "externals" not in path]
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.encode()).digest())[:MAX_FILES]:
        text = read_source(root / path)
        if text:
            yield Document(name, path, text)


def sentences_read() -> set[str]:
    """Return the docstring sentences that the base read, which no row may ask for."""
    return {row["completion"].lower() for row in rows_of(source_documents("pretrain"))}


def signature_examples(
    limit_per_module: int = 250, packages: Iterable[str] = PACKAGES
) -> dict[str, list[Row]]:
    """Return rows of `prompt`, `completion` and `module` for train, validation and test.

    Args:
        limit_per_module: Most rows of one top-level module, so that none dominates.
        packages: Installed packages to read besides the standard library's held-out modules.

    Raises:
        DataError: If a split comes out empty.
    """
    held: dict[str, list[Document]] = {}
    for document in source_documents("heldout"):
        held.setdefault(document.module, []).append(document)
    sources: dict[str, Iterable[Document]] = {n: package_documents(n) for n in sorted(packages)}
    sources |= held
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    seen = sentences_read()
    for split in SPLITS:  # the test split picks first, so that repeats leave the others
        for module in sorted(name for name in sources if split_of(name) == split):
            count = 0
            for row in rows_of(sources[module]):
                completion = row["completion"].lower()
                if completion in seen or row["prompt"] in seen:
                    continue
                seen |= {completion, row["prompt"]}
                splits[split].append(row)
                count += 1
                if count == limit_per_module:
                    break
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"no {split} rows: too few packages with readable source")
    return splits

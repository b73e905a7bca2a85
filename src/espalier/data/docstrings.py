"""The encoder quickstart's data: docstrings, labelled by the subject area of their module.

Read from the standard library and from packages that come with Espalier's dependencies, as
text: nothing is imported or executed. Names that give the label away are masked, the splits
share no module, and near repeats are dropped, so that accuracy measures reading. The order is
that of SHA-256 sums: the same files always give the same rows.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from espalier.base.text import python_files, read_source, stdlib_folder
from espalier.data.areas import PACKAGES, area_map, area_of
from espalier.errors import DataError

Row = dict[str, str]
MASK = "[NAME]"
MIN_WORDS, MAX_WORDS = 16, 60
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
SHINGLE = 5
# What bounds the time: files of one area, and what is read of one docstring.
MAX_FILES, MAX_CHARACTERS = 140, 1000
# Where the description ends and reference material, examples or field lists begin.
END_OF_PROSE = re.compile(
    r"^\s*(?:>>>|:\w+|@\w+|\.\. |-{3,}|={3,}|(?:args|arguments|params|parameters|returns?|yields?|"
    r"raises|example|examples|notes?|usage|attributes|see also|references|keyword arguments|"
    r"options|methods|inputs?|outputs?|shape)\s*:*\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
ADMONITION = re.compile(r"^!!! .*\n(?:[ \t]+.*\n)*", re.MULTILINE)
# Licences, and argument lists that stand without a heading.
NOT_PROSE = re.compile(r"copyright|all rights reserved|, optional|\( ?optional|defaults to", re.I)
NOT_FOLDERS = {"tests", "conftest", "_vendor", "vendored", "externals"}


def sha256(text: str) -> bytes:
    """Return the hash that rows and modules are ordered by."""
    return hashlib.sha256(text.encode()).digest()


def package_names() -> list[str]:
    """Return the top-level packages of the map."""
    return sorted({name.split(".")[0] for names in PACKAGES.values() for name in names.split()})


def module_name(path: Path, root: Path, prefix: str) -> str:
    """Return the dotted name of a file below `root`."""
    parts = [*path.relative_to(root).parts[:-1], path.stem]
    return ".".join([*([prefix] if prefix else []), *(p for p in parts if p != "__init__")])


def files_by_area() -> dict[str, list[tuple[str, Path]]]:
    """Return (module, file) pairs of every area: the standard library, then packages.

    Within both, the hash of the module's name decides the order.
    """
    areas, packages = area_map(), package_names()
    roots = [("", stdlib_folder())]
    for name in packages:
        spec = find_spec(name)
        if spec and spec.submodule_search_locations:
            roots.append((name, Path(spec.submodule_search_locations[0])))
    found: dict[str, list[tuple[str, Path]]] = {}
    for prefix, root in roots:
        for path in python_files(root):
            module = module_name(path, root, prefix)
            area = area_of(module, areas)
            if area and not NOT_FOLDERS & set(module.split(".")):
                found.setdefault(area, []).append((module, path))
    for files in found.values():
        files.sort(key=lambda pair: (pair[0].split(".")[0] in packages, sha256(pair[0])))
    return found


def prose(docstring: str) -> str:
    """Return the description a docstring begins with, on one line and without markup."""
    text = ADMONITION.sub("", docstring[:MAX_CHARACTERS]).strip()
    end = END_OF_PROSE.search(text, 1)
    if end:
        head = text[: end.start()].rstrip()
        # A rule of dashes belongs to the heading above it.
        text = head.rsplit("\n", 1)[0] if end[0].strip()[:3] in ("---", "===") else head
    text = re.sub(r":[\w:]+:`~?([^`]*)`", r"\1", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|<?https?://\S+", r"\1", text)
    return " ".join(re.sub(r"[`*]+|::", " ", text).split())


def masked(text: str, own: set[str], masks: re.Pattern[str]) -> str:
    """Replace the names in `own`, known packages and dotted references by a neutral token."""
    text = masks.sub(MASK, text)
    pieces: list[str] = []
    for piece in re.split(r"(\w+)", text):
        bare = piece.strip("_").lower()
        pieces.append(MASK if bare in own and piece != MASK.strip("[]") else piece)
    return re.sub(rf"(?:{re.escape(MASK)}[.\s]*){{2,}}", MASK + " ", "".join(pieces)).strip()


def name_pattern() -> re.Pattern[str]:
    """Match package names anywhere, and dotted references that begin with a known module."""
    packages = "|".join(map(re.escape, package_names()))
    known = "|".join(sorted({name.split(".")[0] for name in area_map()}, key=len, reverse=True))
    return re.compile(
        rf"\b(?:{known})(?:\.\w+)+(?:\(\))?|\b(?:{packages}|scikit-learn|pytorch|hugging ?face)\b",
        re.IGNORECASE,
    )


def documented(node: ast.AST, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (name, docstring) of a module and its public classes, functions and methods."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and not name.startswith("_"):
            yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
        for child in node.body:  # what is defined inside functions is not looked for
            yield from documented(child, getattr(child, "name", ""))


def file_texts(module: str, path: Path, masks: re.Pattern[str]) -> Iterator[str]:
    """Yield the masked descriptions found in one file."""
    try:
        tree = ast.parse(read_source(path) or "")
    except (SyntaxError, ValueError, RecursionError):
        return
    items = list(documented(tree))
    own = {part.strip("_").lower() for part in module.split(".")}
    # Names defined here that are no plain words: CamelCase or with an underscore.
    own |= {name.lower() for name, _ in items if re.search(r"\w_|[a-z][A-Z]|[A-Z]{2}", name)}
    for _, docstring in items:
        if len(docstring) < MIN_WORDS * 3:
            continue
        words = masked(prose(docstring), own, masks).split()
        text = " ".join(words[:MAX_WORDS])
        if len(words) >= MIN_WORDS and is_prose(text):
            yield text


def is_prose(text: str) -> bool:
    """Tell sentences from licences, argument lists, tables and other languages than English."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return text.isascii() and letters > 0.88 * len(text) and not NOT_PROSE.search(text)


def shingles(text: str) -> set[str]:
    """Return the runs of five words in a text, by which near repeats are found."""
    words = re.findall(r"[a-z]+", text.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def area_rows(
    area: str, files: list[tuple[str, Path]], limit: int, seen: set[str], masks: re.Pattern[str]
) -> list[Row]:
    """Collect up to `limit` rows of an area: a 16th from one module, a third from one package."""
    caps = (max(4, limit // 16), max(8, limit // 3))
    rows: list[Row] = []
    counts: dict[str, int] = {}
    for module, path in files[:MAX_FILES]:
        names = (module, "all of " + module.split(".")[0])
        room = min(cap - counts.get(name, 0) for name, cap in zip(names, caps, strict=True))
        for text in file_texts(module, path, masks) if room > 0 else ():
            runs = shingles(text)
            if len(runs & seen) * 3 >= len(runs):
                continue
            seen |= runs
            rows.append({"text": text, "label": area, "module": module})
            for name in names:
                counts[name] = counts.get(name, 0) + 1
            room -= 1
            if room == 0:
                break
        if len(rows) >= limit:
            break
    return rows[:limit]


def split_rows(rows: list[Row], seed: int) -> dict[str, list[Row]]:
    """Deal the rows of one area out by module: test, then validation, the rest to train."""
    modules: dict[str, list[Row]] = {}
    for row in rows:
        modules.setdefault(row["module"], []).append(row)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    shares = {"test": TEST_SHARE, "validation": VALIDATION_SHARE}
    for module in sorted(modules, key=lambda name: sha256(f"{seed}:{name}")):
        open_ = [name for name, share in shares.items() if len(splits[name]) < share * len(rows)]
        splits[open_[0] if open_ else "train"].extend(modules[module])
    return splits


def docstring_rows(limit_per_class: int = 400, seed: int = 0) -> dict[str, list[Row]]:
    """Return train, validation and test rows of `text`, `label` and `module`.

    Args:
        limit_per_class: Most rows of one area, over the three splits.
        seed: Chooses which modules go to which split.

    Raises:
        DataError: If the limit is too small or an area has too few documented modules.
    """
    if limit_per_class < 20:
        raise DataError("limit_per_class must be at least 20")
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    masks = name_pattern()
    for area, files in sorted(files_by_area().items()):
        parts = split_rows(area_rows(area, files, limit_per_class, seen, masks), seed)
        for name, rows in parts.items():
            if not rows:
                raise DataError(f"no {name} rows for {area!r}: is the library's source there?")
            splits[name] += rows
    for rows in splits.values():
        rows.sort(key=lambda row: sha256(f"{seed}:{row['text']}"))
    return splits


def tfidf_baseline(rows: dict[str, list[Row]]) -> float:
    """Return the test accuracy of tf-idf with logistic regression trained on the same rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english"),
        LogisticRegression(C=3.0, max_iter=200),
    )
    model.fit([row["text"] for row in rows["train"]], [row["label"] for row in rows["train"]])
    test = rows["test"]
    return float(model.score([row["text"] for row in test], [row["label"] for row in test]))


def write_docstrings(folder: Path, limit_per_class: int = 400, seed: int = 0) -> dict[str, Path]:
    """Write train.jsonl, validation.jsonl and test.jsonl into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, rows in docstring_rows(limit_per_class, seed).items():
        paths[name] = folder / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[name].write_text("".join(lines), encoding="utf-8")
    return paths

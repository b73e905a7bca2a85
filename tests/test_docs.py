"""Every command and snippet of README.md and docs/ runs, in order, in one folder per page.

Install lines are what `.ci/run` itself does. The quickstart is shortened, except with `-m slow`, as
is the example that takes minutes, which its page runs. A block ```text is output, ```yaml is
written to the file that its first line names.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from espalier.quickstart.encoder import QUICK
from test_quickstart import check_comparison

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)```", re.S)
EXAMPLES = ROOT / "examples"
ONE_BASE = "python examples/one_base_three_tasks.py --out out"
LONG = {
    "espalier quickstart": "espalier quickstart --quick",
    ONE_BASE: ONE_BASE.replace("examples", shlex.quote(str(EXAMPLES))) + " --quick",
}
INSTALLS = re.compile(r"^\s*(pip install|git clone|cd |python3? -m venv|pytest|\. )")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(kind, body) of every block that does something; Python's in a row are one."""
    found: list[tuple[str, str]] = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        kind, body = block["kind"], block["body"]
        if kind == "python" and found and found[-1][0] == "python":
            body = found.pop()[1] + body
        if kind != "text":
            found.append((kind, body))
    return found


def run(page: Path, folder: Path, slow: bool) -> int:
    """Run a page's blocks; python blocks of a page share their names. Returns how many ran."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # the tests beside this one have the other cores
    }
    code, count = "", 0
    for kind, body in blocks(page):
        count += 1
        if kind == "yaml":
            (folder / body.splitlines()[0].lstrip("# ")).write_text(body)
            continue
        if kind == "python":
            code += body
            command = [sys.executable, "-c", code]
        else:
            lines = [line for line in body.splitlines() if not INSTALLS.match(line)]
            lines = lines if slow else [LONG.get(line, line) for line in lines]
            command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (
            f"{page.name}:\n{body}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, slow=False)
    if page == PAGES[0]:
        check_comparison(tmp_path / "runs" / "quickstart", QUICK)


@pytest.mark.parametrize(
    "example",
    sorted(p for p in EXAMPLES.glob("*.py") if p.name not in ONE_BASE),
    ids=lambda p: p.name,
)
def test_example(example: Path, tmp_path: Path) -> None:
    command, env = [sys.executable, str(example)], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_readme_whole(tmp_path: Path) -> None:
    assert run(ROOT / "README.md", tmp_path, slow=True) > 0


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES[1:] if f"docs/{p.name}" not in readme]
    assert not missing

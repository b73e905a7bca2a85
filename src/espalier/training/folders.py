"""The run folder: checked before anything is loaded, filled as the run goes.

config.yaml    every setting            adapter/    what esp.load reads
metrics.jsonl  a line per step          README.md   the model card
loss.png       the picture              log.txt     what libraries had to say
result.json    once it is finished      state/      for resuming, until it is finished
adapter-as-trained/   where the adapter trained in a richer form than it serves in
rank.png       what a method told of each place while it trained, here its rank
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from espalier.container import write_text
from espalier.errors import CheckpointError, SettingError
from espalier.recipes import Recipe
from espalier.training.config import RunConfig
from espalier.training.memory import in_words
from espalier.wording import setting

AS_TRAINED = "adapter-as-trained"  # with what only training needed, to train on from
_LEAST = 20_000_000  # bytes: less than this is not worth starting with


def choose(config: RunConfig, parts: Recipe) -> Path:
    """The run folder's path: `out`, or the first free runs/<data>-<method>[-n].

    Of the method's settings it names those that differ from their defaults.
    """
    if config.out is not None:
        return config.out
    data = Path(config.train)
    name = data.parent.name if data.stem in ("train", "training", "data") else data.stem
    return first_free(re.sub(r"[^\w.]+", "-", f"{name}-{parts.changes}".lower()).strip("-"))


def first_free(stem: str) -> Path:
    """The first of runs/<stem>, runs/<stem>-2, … that is not there yet."""
    number, path = 1, Path("runs") / stem
    while path.exists():
        number, path = number + 1, Path("runs") / f"{stem}-{number + 1}"
    return path


def refuse_filled(out: Path) -> None:
    """Raise SettingError where something would be overwritten."""
    if out.is_file():
        raise SettingError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()):
        raise SettingError(f"--out {out} is not empty; name another folder.")


def check(path: Path, config: RunConfig) -> None:
    """Refuse a folder that cannot be used, without changing it.

    Raises:
        SettingError: it holds something and neither resume nor overwrite is set, or there is no
            run in it to resume.
        CheckpointError: it cannot be written, or the disk is nearly full.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"The run folder {path} is a file; choose another {setting('out')}.")
    filled = path.is_dir() and any(path.iterdir())
    ours = (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()
    if config.resume and not ours:
        raise SettingError(f"There is no run to resume in {path}.")
    if filled and not (config.resume or config.overwrite):
        raise SettingError(
            f"The run folder {path} is not empty. Choose another {setting('out')}, or go on with "
            f"the run in it ({setting('resume', True)}), or replace it "
            f"({setting('overwrite', True)})."
        )
    if filled and config.overwrite and not ours:
        raise SettingError(
            f"{setting('overwrite', True)}: {path} holds something that is no run; choose another "
            f"{setting('out')}."
        )
    _check_writable(path)
    check_space(path, _LEAST)


def check_space(path: Path, needed: float) -> None:
    """Raise CheckpointError when the disk has less than `needed` bytes for the run folder."""
    free = shutil.disk_usage(_existing(path)).free
    if free < needed:
        raise CheckpointError(
            f"The run needs about {in_words(needed)} in {path}, and {in_words(free)} are free. "
            f"Free some space or choose an {setting('out')} on another disk."
        )


def create(path: Path, config: RunConfig) -> None:
    """Make the folder, emptied of an older run when overwriting, with config.yaml and its log."""
    try:
        if config.overwrite and path.is_dir():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"The run folder {path} cannot be made: {error}") from error
    if not config.resume:
        (path / "metrics.jsonl").touch()
        write_text(path / "config.yaml", config.replace(overwrite=False).to_yaml())


def drop_unstarted(path: Path) -> None:
    """Remove the folder of a run that was refused before its first step."""
    notes = path / "metrics.jsonl"
    if notes.is_file() and notes.stat().st_size == 0:
        shutil.rmtree(path, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(p for p in [path, *path.absolute().parents] if p.exists())


def _check_writable(path: Path) -> None:
    where = _existing(path)
    try:
        # os.access says yes to root on read-only file systems; a file tells the truth.
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise CheckpointError(
            f"The run folder {path} cannot be written: {error.strerror or error} ({where}). "
            f"Choose another {setting('out')}."
        ) from error

"""How a data report looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.tasks.task import Piece

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from espalier.data.checking import Lengths, Report, SplitReport

SHOWN_CHARS = 600
SHOWN_LABELS = 12
PROMPT_STYLE, LEARNED_STYLE = "dim", "bold green"


def render(report: Report) -> RenderableType:
    """Tables of rows and labels, then rows as the loss sees them: prompt dim, targets green."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    columns = ", ".join(
        name if name == column else f"{name} = {column}" for name, column in report.columns.items()
    )
    parts: list[RenderableType] = [Text(f"{report.task}: {columns}", style="bold")]
    parts += [Text(f"· {note}") for note in report.notes]
    parts.append(_rows_table(report))
    if report.labels:
        parts.append(_labels_table(report))
    parts += [Panel(preview_text(p), title="what the loss sees") for p in report.previews]
    return Group(*parts)


def _rows_table(report: Report) -> Table:
    from rich.table import Table

    splits = list(report.splits.values())
    tokenised = any(s.tokenised for s in splits)
    limit = f" (limit {report.max_length})" if report.max_length else ""
    caption = f"tokens before cutting{limit}" if tokenised else None
    table = Table("", *report.splits, caption=caption)
    table.columns[0].style = "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("rows", *(f"{s.rows:,}" for s in splits))
    table.add_row("characters: median · 95 % · longest", *(_lengths(s.chars) for s in splits))
    if tokenised:
        if any(s.tokenised < s.rows for s in splits):
            table.add_row("rows tokenised, a sample", *(f"{s.tokenised:,}" for s in splits))
        table.add_row("tokens: median · 95 % · longest", *(_lengths(s.tokens) for s in splits))
        table.add_row("rows truncated", *(_percent(s.truncated) for s in splits))
        table.add_row("answers cut", *(_percent(s.answers_cut) for s in splits))
        table.add_row("rows without target", *(_places(s) for s in splits))
    table.add_row("duplicates within", *(f"{s.duplicates:,}" for s in splits))
    table.add_row("also in train", *(_overlap(n, s) for n, s in report.splits.items()))
    if any(s.contradictions for s in splits):
        table.add_row("same input, other label", *(f"{s.contradictions:,}" for s in splits))
    return table


def _labels_table(report: Report) -> Table:
    from rich.table import Table

    table = Table("label", *report.splits)
    for column in table.columns[1:]:
        column.justify = "right"
    first = next(iter(report.splits.values()))
    names = sorted(report.labels or [], key=lambda name: -first.labels.get(name, 0))
    for name in names[:SHOWN_LABELS]:
        table.add_row(name, *(_count(s, name) for s in report.splits.values()))
    if len(names) > SHOWN_LABELS:
        rest = names[SHOWN_LABELS:]
        counts = (sum(s.labels.get(n, 0) for n in rest) for s in report.splits.values())
        table.add_row(f"… {len(rest)} more", *(f"{count:,}" for count in counts))
    return table


def preview_text(pieces: Sequence[Piece]) -> Text:
    """A row as the loss sees it; the middle of long stretches is left out, their ends kept."""
    from rich.text import Text

    text = Text()
    room = SHOWN_CHARS if len(pieces) < 4 else SHOWN_CHARS // 4
    for i, piece in enumerate(pieces):
        shown = piece.text
        if len(shown) > room:
            shown = f"{shown[: room // 2]} […] {shown[-room // 2 :]}"
        if i and piece.learned and not shown[:1].isspace() and not text.plain[-1:].isspace():
            text.append(" ")
        text.append(shown, style=LEARNED_STYLE if piece.learned else PROMPT_STYLE)
    return text


def _lengths(found: Lengths | None) -> str:
    return "–" if found is None else f"{found.median:,} · {found.p95:,} · {found.longest:,}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _places(split: SplitReport) -> str:
    if not split.without_target:
        return "0"
    return f"{len(split.without_target):,} (first: {split.without_target[0]})"


def _overlap(name: str, split: SplitReport) -> str:
    return "" if name == "train" else f"{split.in_train:,} ({split.in_train / split.rows:.1%})"


def _count(split: SplitReport, name: str) -> str:
    count = split.labels.get(name, 0)
    return f"{count:,} ({count / max(sum(split.labels.values()), 1):.0%})"

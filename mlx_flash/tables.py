"""Tables: drawn for a person at a terminal, Markdown for files and pipes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import printable

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; `left` columns are words, the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        """The table in Markdown."""
        rules = ["---" if i < self.left else "--:" for i, _ in enumerate(self.headings)]
        lines = [self.headings, *self.rows]
        texts = [" | ".join(_cell(cell) for cell in line) for line in lines]
        head, *rows = (f"| {text} |" for text in texts)
        return "\n".join([head, f"|{'|'.join(rules)}|", *rows])

    def rich(self) -> "rich.table.Table":
        """The same for rich to draw."""
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, heading in enumerate(self.headings):
            drawn.add_column(
                Text(heading),
                justify="left" if i < self.left else "right",
                overflow="fold",
            )
        for row in self.rows:
            drawn.add_row(*(Text(printable(cell)) for cell in row))
        return drawn


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")

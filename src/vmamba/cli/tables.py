"""Printing: tables, JSON and CSV, to the terminal or whole into a file."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from typing import Any

from vmamba.files import atomic_write, json_bytes


class Table:
    """Rows of text: drawn with lines on a terminal, in plain aligned columns elsewhere."""

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> None:
        self.header, self.rows, self.right = header, [[str(cell) for cell in row] for row in rows], right

    def __str__(self) -> str:
        lines = [list(self.header)] * any(self.header) + self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def draw(self) -> None:
        """Print to the terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, show_header=any(self.header))
        for column, title in enumerate(self.header):
            table.add_column(title, justify="right" if column in self.right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        Console(highlight=False, markup=False).print(table)


def write(result: Any, path: str | None = None) -> None:
    """Print a result, or put it into a file: tables and texts as they are, anything else as JSON."""
    if isinstance(result, Table) and path is None and sys.stdout.isatty():
        result.draw()
        return
    # What is left of a file name that is no UTF-8 becomes an escape.
    is_text = isinstance(result, str | Table)
    data = (str(result).encode(errors="backslashreplace") if is_text else json_bytes(result)) + b"\n"
    if path is None:
        sys.stdout.write(data.decode())
        return
    with atomic_write(path) as file:
        file.write(data)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV, without the last line's end."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def brief(value: Any) -> str:
    """One line that shows a setting or metadata."""
    if value is None or (isinstance(value, dict | list | tuple) and not value):
        return "–"
    if isinstance(value, dict):
        return ", ".join(f"{k} {brief(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(brief, value[:12])) + (f" … ({len(value)})" if len(value) > 12 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def flops(number: float) -> str:
    """Multiply-accumulates, in billions or millions."""
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def contents(module: Any) -> str:
    """The kinds of layer in a part of a model, in order; repeated ones counted."""
    blocks = getattr(module, "blocks", None)
    if blocks is not None and len(blocks):
        before = [type(child).__name__ for name, child in module.named_children() if name != "blocks"]
        before = [name for name in before if name != "Identity"]
        return ", ".join([*before, f"{len(blocks)} × {type(blocks[0]).__name__}"])
    return ", ".join(type(child).__name__ for child in module.children()) or type(module).__name__

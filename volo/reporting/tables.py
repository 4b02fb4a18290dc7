"""Tables of plain text, for terminals and logs."""

from collections.abc import Sequence

from tabulate import tabulate

from volo.runtime.text import printable


def text_table(headers: Sequence[str], rows: Sequence[Sequence], align: str = "") -> str:
    """Return a table of plain text.

    Args:
        headers: Column titles.
        rows: Cells: text (shown by :func:`printable`), numbers (floats with up to six digits) or None, shown as "-".
        align: One letter per column: "l" left, "r" right; by default all are left.
    """
    assert all(len(row) == len(headers) for row in rows), "a row has as many cells as there are headers"
    texts = [
        ["-" if c is None else f"{c:g}" if isinstance(c, float) else printable(str(c)) for c in row] for row in rows
    ]
    sides = {"l": "left", "r": "right"}
    columns = [sides[letter] for letter in align or "l" * len(headers)]
    table = tabulate(texts, headers, tablefmt="simple", colalign=columns if rows else None, disable_numparse=True)
    return "\n".join(line.rstrip() for line in table.splitlines())

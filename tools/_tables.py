"""Tables in Markdown, and the pages that hold them."""

from collections.abc import Iterable, Sequence


def markdown_table(lines: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a table; the second is the rule, such as ``['---', '---:']``."""
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def insert_table(text: str, table: str, begin: str, end: str) -> str:
    """``text`` with what stands between the lines ``begin`` and ``end`` replaced by the table."""
    head, rest = text.split(begin)
    return f'{head}{begin}\n{table}\n{end}{rest.split(end)[1]}'

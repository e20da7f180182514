"""Document -> Markdown: the page's twin for pull requests and terminals, with the same words and numbers."""

from __future__ import annotations

from collections.abc import Iterable

from normkit.report.document import Block, Code, Document, Figure, Folded, Items, Legend, Part, Table, Text


def render(document: Document) -> str:
    """The whole document; pictures become their text alternatives."""
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    for section in document.sections:
        parts += [f"## {_plain(section.title)}", _blocks(section.blocks, level=3)]
    return "\n\n".join([*parts, "---", _plain(document.footer)]) + "\n"


def _blocks(blocks: Iterable[Block], level: int) -> str:
    return "\n\n".join(text for block in blocks if (text := _block(block, level)))


def _block(block: Block, level: int) -> str:
    match block:
        case Text(text, kind):
            return f"**{_plain(text)}**" if kind == "answer" else _plain(text)
        case Items(items, None):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Items(items, list(terms)):
            return "\n".join(f"- **{_plain(t)}**: {_plain(i)}" for t, i in zip(terms, items, strict=True))
        case Table():
            return _table(block)
        case Code(text):
            fence = "```" if "```" not in text else "~~~~"
            return f"{fence}\n{text}\n{fence}"
        case Folded(title, blocks) | Part(title, blocks):
            return f"{'#' * level} {_plain(title)}\n\n{_blocks(blocks, level + 1)}"
        case Figure():
            figure = f"*Figure.* {_plain(block.alternative)}"
            return f"{figure}\n\n{_table(block.numbers)}" if block.numbers else figure
        case Legend():
            return ""  # colours say nothing here
    raise TypeError(f"markdown: no way to write a {type(block).__name__}")


def _table(table: Table) -> str:
    rule = ["---:" if index in table.numeric else "---" for index in range(len(table.header))]
    lines = [table.header, rule, *table.rows]
    text = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    return f"{_plain(table.caption)}\n\n{text}" if table.caption else text


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Keep what an experiment is called from being read as markup."""
    for sign in ("\\", "`", "*", "_", "<", "#"):
        text = text.replace(sign, f"\\{sign}")
    return text

"""The page as a tree of plain blocks, so that HTML and Markdown say the same with the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str
    kind: str = "body"  # "body", "answer" or "note"


@dataclass(frozen=True)
class Items:
    """A list; ``terms`` set a word in front of each item."""

    items: list[str]
    terms: list[str] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; ``numeric`` columns are set flush right with tabular figures.

    ``arms`` gives the arm of each row (None for none), so that a renderer may show the arm's colour.
    """

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    numeric: frozenset[int] = frozenset()
    arms: list[str | None] | None = None


@dataclass(frozen=True)
class Figure:
    """A picture with its caption, its text alternative, and the numbers it shows as a table."""

    svg: str
    title: str
    alternative: str
    numbers: Table | None = None
    wide: bool = False


@dataclass(frozen=True)
class Code:
    """Preformatted text: a command, a configuration, a traceback."""

    text: str


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that opens them."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Part:
    """Blocks under a heading of their own within a section; ``kind`` is a colour of the document, "" for none."""

    title: str
    blocks: list[Block]
    kind: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Legend:
    """The arms and their colours, once per group of figures: (name, words)."""

    arms: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A heading with its blocks; ``anchor`` is its address in the page."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """The whole page."""

    title: str
    subtitle: str
    sections: list[Section]
    colours: dict[str, int]
    footer: str = ""


Block = Text | Items | Table | Figure | Code | Folded | Part | Legend

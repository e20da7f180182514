"""Document -> one self-contained HTML file: inline style and pictures, no script, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files

from normkit.report.document import Block, Code, Document, Figure, Folded, Items, Legend, Part, Section, Table, Text

EFFECT = re.compile(r"((?:more than )?(?:[\d.]+× to )?[\d.]+× (?:fewer steps|more steps|less time|more time))")
INTERVAL = re.compile(r"(\[[−+\d.]+, [−+\d.∞]+\]|\(one seed\)|\((?:≥ )?[\d.]+ decades\))")


def render(document: Document) -> str:
    """The page as text; the same document always gives the same bytes."""
    style = files("normkit.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a> ' for s in document.sections if s.title)
    sections = "\n".join(_section(section, document.colours) for section in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)} – normkit</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(document.title)}</h1><p>{escape(document.subtitle)}</p>"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{sections}\n</main>\n'
        f"<footer>{escape(document.footer)}</footer>\n</body>\n</html>\n"
    )


def _section(section: Section, colours: dict[str, int]) -> str:
    body = _blocks(section.blocks, colours)
    return f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>\n{body}\n</section>'


def _blocks(blocks: Iterable[Block], colours: dict[str, int]) -> str:
    """Neighbouring figures share one grid."""
    parts: list[str] = []
    figures: list[str] = []

    def close_grid() -> None:
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures.clear()

    for block in blocks:
        if isinstance(block, Figure):
            figures.append(_figure(block, colours))
            continue
        close_grid()
        parts.append(_block(block, colours))
    close_grid()
    return "\n".join(parts)


def _block(block: Block, colours: dict[str, int]) -> str:
    match block:
        case Text(text, kind):
            return f'<p class="{kind}">{_rich(text) if kind == "answer" else _prose(text)}</p>'
        case Items(items, None):
            return f"<ul>{''.join(f'<li>{_prose(item)}</li>' for item in items)}</ul>"
        case Items(items, list(terms)):
            pairs = zip(terms, items, strict=True)
            return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{_prose(item)}</dd>' for term, item in pairs)}</dl>"
        case Table():
            return _table(block, colours)
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Folded(title, blocks):
            body = _blocks(blocks, colours)
            return f'<details class="block"><summary>{escape(title)}</summary>\n{body}</details>'
        case Part(title, blocks, kind, anchor):
            body, address = _blocks(blocks, colours), f' id="{escape(anchor)}"' if anchor else ""
            return f'<article class="part"{address}><h3>{_chip(colours, kind)}{escape(title)}</h3>\n{body}\n</article>'
        case Legend(arms):
            entries = (f"<li>{_chip(colours, name)}{escape(words)}</li>" for name, words in arms)
            return f'<ul class="legend">{"".join(entries)}</ul>'
    raise TypeError(f"html: no way to write a {type(block).__name__}")


def _figure(figure: Figure, colours: dict[str, int]) -> str:
    numbers = ""
    if figure.numbers is not None:
        numbers = f"<details><summary>the numbers</summary>{_table(figure.numbers, colours)}</details>"
    wide = ' class="wide"' if figure.wide else ""
    title = figure.title[:1].upper() + figure.title[1:]
    return f"<figure{wide}><figcaption>{escape(title)}</figcaption>{figure.svg}{numbers}</figure>"


def _table(table: Table, colours: dict[str, int]) -> str:
    def css(index: int) -> str:
        return ' class="n"' if index in table.numeric else ""

    arms = table.arms or [None] * len(table.rows)
    first_text = max((i for i in range(len(table.header)) if i not in table.numeric), default=0)
    head = "".join(f'<th scope="col"{css(i)}>{escape(cell)}</th>' for i, cell in enumerate(table.header))
    lines = []
    for arm, row in zip(arms, table.rows, strict=True):
        cells = []
        for index, cell in enumerate(row):
            named = index == first_text and arm is not None
            text = (_chip(colours, arm) if named else "") + _interval(escape(cell))
            kind = ' class="name"' if named else css(index)
            cells.append(f"<td{kind}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{caption}{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _chip(colours: dict[str, int], arm: str | None) -> str:
    return f'<i class="chip" style="--c:var(--arm-{colours[arm]})"></i>' if arm in colours else ""


def _interval(text: str) -> str:
    return INTERVAL.sub(r'<span class="ci">\1</span>', text)


def _rich(text: str) -> str:
    """The answer: effects in bold, intervals stepping back."""
    return EFFECT.sub(r"<b>\1</b>", _prose(text))


def _prose(text: str) -> str:
    """A number stays on one line with its percent sign."""
    return _interval(escape(text).replace(" %", "\N{NO-BREAK SPACE}%"))

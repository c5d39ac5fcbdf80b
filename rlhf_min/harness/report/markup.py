"""HTML and SVG as nested calls: all text is escaped, and every element is closed."""

import html
import re
from collections.abc import Iterable

# A model may draw any byte; these HTML does not allow.
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
VOID = ("meta", "br")  # elements that HTML never closes


def escape(text: str) -> str:
    r"""Text as HTML; what HTML does not allow is shown as an escape.

    >>> escape("1 < 2\0")
    '1 &lt; 2\\x00'
    """
    return html.escape(CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text))


class Html(str):
    """Text that is markup already; a `tag` escapes all other text."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        name: of the element.
        children: texts, numbers and elements, in their order; None is nothing.
        attributes: ``class_`` is class; other underscores are hyphens. None leaves one out.

    >>> print(tag("p", "1 < 2, ", tag("b", "always"), class_="note"))
    <p class="note">1 &lt; 2, <b>always</b></p>
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" + ("" if name in VOID else f"{join(*children)}</{name}>"))


def join(*children: object) -> Html:
    """Texts and elements one after the other."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def table(heads: Iterable[object], lines: Iterable[Iterable[object]]) -> Html:
    """A table whose first column names its lines, in a box that scrolls where the page is narrow.

    Args:
        heads: of the columns; none leaves the head out. What is a ``th`` already stays as it is.
        lines: the cells of each, whose ``td`` may be given too.
    """
    head = [cell(head, "th", scope="col") for head in heads]
    body = [
        tag("tr", cell(first, "th", scope="row"), *[cell(content, "td") for content in rest])
        for first, *rest in lines
    ]
    parts = [tag("thead", tag("tr", *head)) if head else None, tag("tbody", *body)]
    return tag("div", tag("table", *parts), class_="scroll", tabindex=0)


def cell(content: object, name: str, **attributes: object) -> Html:
    """A cell of a table, if the content is not one yet."""
    if isinstance(content, Html) and content.startswith(("<td", "<th")):
        return content
    return tag(name, content, **attributes)

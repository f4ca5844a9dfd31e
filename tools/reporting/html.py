"""HTML from functions: whatever is no ``Html`` is escaped, so that no text of a run can become markup (pure)."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence

_VOID = ("br", "img", "input", "link", "meta")


class Html(str):
    """A piece of finished markup."""


Node = Html | str | int | float | None


def tag(name: str, /, *children: Node, **attributes: object) -> Html:
    """An element. A text child is escaped; None and False leave a child or an attribute out, True gives a bare one.

    ``class_`` and ``for_`` are class and for; other underscores become hyphens.
    """
    given = "".join(
        f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'
        for key, value in ((_attribute(key), value) for key, value in attributes.items())
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{join(*children)}</{name}>"))


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def join(*children: Node) -> Html:
    """Children one after the other, text escaped."""
    return Html(
        "".join(c if isinstance(c, Html) else html.escape(str(c), quote=False) for c in children if c is not None)
    )


def breakable(name: str) -> Html:
    """A name in which a line may end behind each underscore."""
    return Html("_<wbr>".join(join(part) for part in name.split("_")))


def slug(text: str) -> str:
    """The text as an id: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def table(
    columns: Sequence[Node],
    rows: Iterable[Sequence[Node]],
    *,
    caption: str,
    text_columns: int = 1,
    class_: str | None = None,
) -> Html:
    """A table that scrolls in its own box; the first cell of a row is its heading, numbers stand on the right.

    The first ``text_columns`` columns are text and stand on the left.
    """
    head = [
        tag("th", column, scope="col", class_=None if i < text_columns else "n") for i, column in enumerate(columns)
    ]
    body = []
    for row in rows:
        first = tag("th", row[0], scope="row")
        cells = [tag("td", c, class_=None if i < text_columns else "n") for i, c in enumerate(row[1:], start=1)]
        body.append(tag("tr", first, *cells))
    made = tag(
        "table",
        tag("caption", caption, class_="hidden"),
        tag("thead", tag("tr", *head)),
        tag("tbody", *body),
        class_=class_,
    )
    return scroll(made, caption)


def scroll(child: Html, label: str) -> Html:
    """A box in which something wide scrolls; the keyboard can reach it."""
    return tag("div", child, class_="scroll", role="region", aria_label=label, tabindex=0)


def definitions(rows: Mapping[str, Node], *, long: bool = False) -> Html:
    """Names and their values, which stand in columns where they are not ``long``."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows.items() if value is not None]
    return tag("dl", *pairs, class_="facts long" if long else "facts")


def note(*children: Node, class_: str = "") -> Html:
    """A quiet paragraph."""
    return tag("p", *children, class_=f"note {class_}".strip())


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, without needless noughts; 5e-05 is 5e-5."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return count(value) if abs(value) >= 1e4 else str(int(value))
    if abs(value) >= 10**digits:
        return count(value)
    return re.sub(r"e([+-])0*", lambda m: "e-" if m[1] == "-" else "e", f"{value:.{digits}g}")


def cut(text: str, length: int) -> Html:
    """The text, cut where it is longer than ``length`` characters, saying how much is missing."""
    if len(text) <= length:
        return join(text)
    left_out = tag("span", f" … {count(len(text) - length)} characters more", class_="cut")
    return join(text[:length].rstrip(), left_out)

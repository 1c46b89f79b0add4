"""A page: elements whose text is escaped as they are made, the frame around them, and the file.

Whatever a name or an answer holds, it is shown and never parsed: text becomes markup in `element` alone. The page's own policy
lets a browser neither fetch nor run anything.
"""

import html
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sculptor import __version__
from sculptor.checkpoint.directory import published_name
from sculptor.checkpoint.staging import check_apart, partial_path, writing
from sculptor.errors import OutputError, SettingsError
from sculptor.jobs.readme import is_hub_name
from sculptor.report.html.style import STYLE

_VOID = ("meta", "br", "wbr")
_TENSOR = re.compile(r"[\w-]+(\.[\w-]+){2,}")
_MOST_SHOWN = 12
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
GENERATOR = f"sculptor {__version__}"  # what every page and picture says made it
_BY_US = re.compile(
    rb'<meta name="generator" content="sculptor |Software\0sculptor |/Creator \(sculptor |<dc:title>sculptor |%%Creator: sculptor '
)
_SUFFIXES = (".html", ".htm")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def element(tag: str, *children: Child, **attributes: str | None) -> Markup:
    """`<tag ...>children</tag>`: text and attributes are escaped, markup is not.

    An attribute `class_` is `class`, `aria_label` is `aria-label`; None leaves one out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(words(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{_inside(children)}</{tag}>")


def _inside(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(words(child), quote=False)
    return "".join(map(_inside, child))


def words(text: str) -> str:
    """Text as it can be shown: control characters, lone surrogates and turns of direction as their escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def page(command: str, what: str, *sections: Child) -> str:
    """A whole document."""
    title = f"{what} · sculptor {command}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=GENERATOR),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    top = element("header", element("p", f"sculptor {command}", class_="soft"), element("h1", what))
    foot = element("footer", f"Written by sculptor {__version__}. One file: it fetches nothing and runs nothing.")
    body = element("body", element("main", top, sections, foot))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def place_name(place: str | Path) -> str:
    """What a page calls a directory or a hub name: nobody's folders."""
    if not os.path.exists(place) and is_hub_name(str(place)):
        return str(place)
    return published_name(Path(place))


def section(heading: str, *children: Child) -> Markup:
    """A part of a page, under its heading."""
    return element("section", element("h2", heading), children)


def note(*text: Child) -> Markup:
    """What has to be known to read what is beside it."""
    return element("p", text, class_="note")


def tiles(entries: Iterable[tuple[str, str, str | None]]) -> Markup:
    """Figures that come first: label, value, and what it is."""
    return element(
        "dl",
        [
            element("div", element("dt", label), element("dd", value, None if more is None else element("small", more)))
            for label, value, more in entries
        ],
        class_="tiles",
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, *, prose: bool = False) -> Markup:
    """A table of text; the first column names the row."""
    body = [
        element("tr", element("th", _breakable(row[0]), scope="row"), [element("td", value) for value in row[1:]])
        for row in rows
    ]
    columns = element("thead", element("tr", [element("th", name, scope="col") for name in head]))
    return scrolled(
        element("table", columns, element("tbody", body), class_="plain words" if prose else "plain"), label
    )


def scrolled(content: Markup, label: str) -> Markup:
    """What may be wider than a phone: it scrolls by itself, by the keyboard too."""
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def details(summary: str, *children: Child) -> Markup:
    """What few want to see."""
    return element("details", element("summary", summary), children)


def listed(items: Sequence[str]) -> Markup:
    """A list of names or sentences."""
    return element("ul", [element("li", _breakable(item)) for item in items])


def listed_shortly(items: Sequence[str]) -> Child:
    """A list whose end is folded away where it is long."""
    rest = items[_MOST_SHOWN:]
    return [listed(items[:_MOST_SHOWN]), details(f"{len(rest)} more", listed(rest)) if rest else None]


def _breakable(text: str) -> Child:
    """The name of a tensor may go on in the next line behind a dot, rather than anywhere."""
    if not _TENSOR.fullmatch(text):
        return text
    first, *rest = text.split(".")
    return [first, [[".", element("wbr"), part] for part in rest]]


def check_page(
    path: Path, overwrite: bool, output: Path | None = None, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Refuses a place where a page could not be written, before any work.

    Args:
        path: the file.
        overwrite: allow one of ours that exists.
        output: the directory that the command makes; it holds a model, and nothing else.
        inputs: what the command reads; a page lies in none of it.

    Raises:
        SettingsError: if the name is not that of a page.
        OutputError: if it exists, or is not ours, has no folder, or lies in an input.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise SettingsError(f"--html {path}: expected a name that ends in .html")
    check_place(path, "--html", overwrite, inputs, output)


def is_by_us(path: Path) -> bool:
    """Whether a page or a picture says that sculptor made it; a format without room for that does not."""
    with suppress(OSError):
        return _BY_US.search(path.read_bytes()) is not None
    return False


def check_place(
    path: Path,
    option: str,
    overwrite: bool,
    inputs: Iterable[str | Path | None] = (),
    output: Path | None = None,
    is_ours: Callable[[Path], bool] = is_by_us,
) -> None:
    """Refuses a place where a file could not be written, before any work; it lies in no input or output, and is none.

    What is replaced is only ever a file of ours, however it is asked for.

    Raises:
        SettingsError: if it lies in the output.
        OutputError: if it exists, or is not ours, has no folder, or lies in an input.
    """
    if output is not None and {output.resolve(), partial_path(output).resolve()} & set(path.resolve().parents):
        raise SettingsError(f"{option} {path}: lies in the output {output}; choose a place beside it")
    check_apart(path.resolve(), filter(None, inputs))
    if path.exists() and not is_ours(path):
        raise OutputError(f"{path}: exists already, and was not written by sculptor; choose another {option}")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another {option} or pass --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it or choose another {option}")


def write_page(path: Path, content: str, overwrite: bool) -> None:
    """Writes a page, whole or not at all.

    Raises:
        OutputError: if it cannot be written, or something has come there since.
    """
    check_page(path, overwrite)
    write_file(path, content)


def write_file(path: Path, content: str) -> None:
    """Writes a text, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a file to be written beside a file's place, which it then takes, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)

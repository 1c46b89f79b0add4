"""Answers beside each other, as text."""

import itertools
import textwrap
from collections.abc import Sequence

from sculptor.report.text import WIDTH
from sculptor.tasks.chat import Reply

_GAP = "  |  "


def replies_text(replies: Sequence[Reply], width: int = WIDTH) -> str:
    """One answer as it is, several in columns under the names of their models."""
    if len(replies) == 1:
        return "\n".join(_lines(replies[0].text, width))
    each = (width - len(_GAP) * (len(replies) - 1)) // len(replies)
    heads = [reply.name if len(reply.name) <= each else "…" + reply.name[-(each - 1) :] for reply in replies]
    columns = [[head, "-" * len(head), *_lines(reply.text, each)] for head, reply in zip(heads, replies, strict=True)]
    return "\n".join(
        _GAP.join(cell.ljust(each) for cell in cells).rstrip()
        for cells in itertools.zip_longest(*columns, fillvalue="")
    )


def _lines(text: str, width: int) -> list[str]:
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.expandtabs())
    lines = [part for line in shown.split("\n") for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]
    return lines if any(lines) else ["(nothing)"]

"""What rows become, as text."""

import textwrap

from sculptor.jobs.data_report import DataReport, ExamplePreview
from sculptor.report.text import WIDTH, table

_SHOWN = 600  # characters of a sequence
_SEQUENCES = 4  # of a row


def data_text(found: DataReport) -> str:
    """What `sculptor data` prints."""
    lines = [table(["data", "rows", "sequences", "in an epoch"], [
        [source.name, f"{source.num_rows:,}", f"{source.num_examples:,}", f"{source.num_epoch:,}"] for source in found.sources
    ])]  # fmt: skip
    for source in found.sources:
        lines += _folded(f"{source.name}: read as {source.form}.")
        if source.unread:
            lines += _folded(f"  keys that are not read: {', '.join(source.unread)}")
        if source.num_off:
            lines.append(f"  {source.num_off:,} rows left out by their own weight")
    lines.append("")
    for row in found.rows:
        lines.append(row.where)
        for example in row.examples[:_SEQUENCES]:
            lines += [
                f"  {example.num_tokens:,} tokens, {example.num_learned:,} with loss",
                *_wrapped(_marked(example)),
            ]
        if len(row.examples) > _SEQUENCES:
            lines.append(f"  and {len(row.examples) - _SEQUENCES} more sequences")
        lines += [f"  {remark}" for remark in row.remarks]
        lines.append("")
    sums = [
        ("rows", found.num_rows), ("sequences", found.num_examples), ("tokens read", found.num_tokens),
        ("tokens with loss", found.num_learned), ("longest sequence", found.longest), ("longest allowed", found.max_length),
        ("rows or turns dropped, too long", found.num_dropped), ("rows with a prompt cut", found.num_cut),
        ("rows in several sequences", found.num_split), ("rows given an end", found.num_ended),
        ("rows that the template rewrites", found.num_rewritten),
        ("rows tokenised apart at the edge", found.num_apart),
    ]  # fmt: skip
    lines.append(table(["in all", ""], [[name, f"{value:,}"] for name, value in sums]))
    lines += [line for remark in found.remarks for line in _folded(remark)]
    lines.append("Loss is on what stands between » and «.")
    return "\n".join(lines)


def _marked(example: ExamplePreview) -> str:
    text = "".join(f"»{part}«" if on else part for part, on in example.parts)
    if example.target is not None:
        text = f"{text} -> »{example.target}«"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def _folded(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _wrapped(text: str) -> list[str]:
    width = WIDTH - 4
    return [f"    {text[i : i + width]}" for i in range(0, len(text), width)]

"""What a run is known by, to be taken up where it was stopped: settings, and digests of inputs."""

from collections.abc import Mapping
from typing import Any

# Inputs are told by digests, which say nothing to a reader.
_HINTS = {
    "base": "the matrices of the model changed since",
    "rows": "the data files hold other rows now",
    "tokens": "the same rows have other tokens now: another tokenizer or chat template, or one that prints the date",
    "tokenizer and generation": "the model's files of its tokenizer, or of how it generates, changed since",
    "threads": "threads was {old}, now {new}: set OMP_NUM_THREADS={old}",
}


def key_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What makes a run another than the one that left something to resume: settings with both values, inputs by name."""
    different = sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))
    if not different:
        return None
    name = next((name for name in ("model", "eval_data", *_HINTS) if name in different), different[0])
    old, new = saved.get(name), now.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        if name == "model":
            return f"{', '.join(different)}; {', '.join(changed[:3])}{more} changed since"
        name, old, new = f"{name}.{changed[0]}", old.get(changed[0]), new.get(changed[0])
    told = _HINTS.get(name, "{name} was {old}, now {new}").format(name=name, old=_short(old), new=_short(new))
    return f"{', '.join(different)}; {told}"


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:59] + "…"

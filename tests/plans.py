"""The plan of two tasks that tests of sequences run, with the model and all rows in files beside it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_EVALUATE = {"exact_match": False}


def two_tasks(watch: Sequence[str] = (), held_out: bool = False, **sections: Mapping[str, Any]) -> str:
    """TOML of a plan; `held_out` tasks have test rows of their own, and the first validation rows, those of the second.

    Args:
        watch: files of watched texts.
        held_out: else a task is tested on the rows that it is trained on.
        sections: values of `[analyze]`, `[train]`, `[adapter]`, on a CPU.
    """
    chosen = {name: {**values, **({} if name == "adapter" else {"device": "cpu"})} for name, values in sections.items()}
    lines = ['model = "base"', *([f"watch = {json.dumps(list(watch))}"] if watch else [])]
    for name, values in {**chosen, "evaluate": _EVALUATE}.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    for name in ("first", "second"):
        test = f"{name}-test" if held_out else name
        lines += ["[[tasks]]", f'name = "{name}"', f'data = ["{name}.jsonl"]', f'test = ["{test}.jsonl"]']
        lines += ['validation = ["second-test.jsonl"]'] if held_out and name == "first" else []
    return "\n".join(lines) + "\n"

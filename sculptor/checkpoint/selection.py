"""Which of a model's matrices people mean by a pattern."""

import fnmatch
from collections.abc import Sequence

from sculptor.checkpoint.architecture import Target
from sculptor.errors import SettingsError


def select_targets(targets: Sequence[Target], include: Sequence[str], exclude: Sequence[str]) -> tuple[Target, ...]:
    """The targets that some `include` pattern (all, if none is given) and no `exclude` pattern matches.

    A pattern is a shell glob on the tensor name, the role or the last part of the role (`q_proj`, `mlp.*`,
    `*.layers.0.*`).

    Raises:
        SettingsError: if a pattern matches nothing, or nothing is left.
    """
    roles = sorted({target.role for target in targets})
    for option, patterns in (("--targets", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(target, pattern) for target in targets):
                raise SettingsError(
                    f"{option} {pattern!r} matches none of the {len(targets)} matrices; roles: {', '.join(roles)}"
                )
    chosen = tuple(
        target
        for target in targets
        if (not include or any(_matches(target, pattern) for pattern in include))
        and not any(_matches(target, pattern) for pattern in exclude)
    )
    if not chosen:
        raise SettingsError(f"--targets and --exclude leave none of the {len(targets)} matrices")
    return chosen


def _matches(target: Target, pattern: str) -> bool:
    names = (target.name, target.module, target.role, target.role.rpartition(".")[2])
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)

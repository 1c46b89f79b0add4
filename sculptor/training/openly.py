"""What is trained beside the matrices of an archive: parameters that nothing protects, by patterns on their names."""

import fnmatch
from collections.abc import Sequence

from sculptor.archive.store import Archive
from sculptor.checkpoint.architecture import Architecture
from sculptor.errors import SettingsError


def select_extra(architecture: Architecture, archive: Archive, patterns: Sequence[str]) -> dict[str, str]:
    """Parameter of the model -> tensor of the checkpoint.

    Raises:
        SettingsError: if a pattern matches none.
    """
    protected = {record.tensor for record in archive.values()}
    candidates = {
        parameter: name
        for parameter, name in architecture.tensors.items()
        if name not in protected and parameter in architecture.parameters
    }
    chosen: dict[str, str] = {}
    for pattern in patterns:
        found = {
            p: name for p, name in candidates.items() if fnmatch.fnmatchcase(p, pattern) or pattern in p.split(".")
        }
        if not found:
            raise SettingsError(
                f"--also-train {pattern!r} matches no unprotected parameter; use a glob on names like {next(iter(candidates))}"
            )
        chosen |= found
    return chosen

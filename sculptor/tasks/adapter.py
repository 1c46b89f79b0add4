"""A LoRA adapter in the place of a model: merged into its base first, one tensor in memory at a time."""

import functools
from collections.abc import Callable
from pathlib import Path

from sculptor.checkpoint.adapter import CONFIG_NAME, is_adapter
from sculptor.checkpoint.reader import find_directory
from sculptor.checkpoint.staging import check_apart
from sculptor.edits.settings import Interpolate
from sculptor.errors import CheckpointError, OutputError, SettingsError
from sculptor.jobs.processes import join
from sculptor.progress import Progress, silent
from sculptor.tasks.edit import edit
from sculptor.validation import parse, read_file


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
    goes_to: Path | None = None,
    notice: Callable[[str], object] = lambda _: None,
) -> Path:
    """Writes the checkpoint that an adapter and its base make together: W0 + s B A in float64, rounded once.

    Args:
        adapter: a LoRA adapter as PEFT saves it, directory or hub name.
        output: directory of the merged checkpoint, with the base's tokenizer and a record.
        base: its base [default: what the adapter's configuration names].
        device: where products run.
        progress: makes progress bars.
        goes_to: what is made of the merged checkpoint next; it may not lie in what is read here either.
        notice: told, in a line each, what of the adapter's tokenizer the merged checkpoint does not have.

    Returns:
        `output`.

    Raises:
        SculptorError: if it is no adapter, is of another kind than plain LoRA, or its base is not to be found.
    """
    path = find_directory(adapter)
    if not is_adapter(path):
        raise SettingsError(f"--merge-adapter without effect: {path} is no adapter")
    output = Path(output).resolve()
    named = _base_of(path) if base is None else base
    if goes_to is not None:
        check_apart(goes_to.resolve(), [path, named])
        if output in (goes_to.resolve(), *goes_to.resolve().parents):
            raise OutputError(f"{goes_to}: lies in what is merged first, {output}; choose a place beside it")
    merge = functools.partial(edit, named, path, output, Interpolate(alpha=1.0), device=device, progress=progress)
    for what in join(device).once(lambda: merge().not_taken):
        notice(
            f"{path.name}: not taken of the adapter: {what}; put its file into the merged checkpoint, if rows want it"
        )
    return output


def _base_of(path: Path) -> str:
    file, remedy = path / CONFIG_NAME, "save the adapter again with PEFT"
    found = parse(read_file(file, CheckpointError, remedy), file, CheckpointError, remedy).get(
        "base_model_name_or_path"
    )
    if not isinstance(found, str) or not found:
        raise CheckpointError(
            f"{file}: names no base; give it: sculptor edit interpolate BASE {path} --alpha 1 --output DIR"
        )
    return found

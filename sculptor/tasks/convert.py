"""`sculptor.convert`: an archive of an earlier format as one of today's."""

import shutil
from contextlib import closing
from pathlib import Path

from sculptor.archive.store import MANIFEST_NAME, Archive
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.staging import check_apart, commit, staging, write_json, writing
from sculptor.methods.kinds import Kinds
from sculptor.progress import Progress, silent


def convert(
    archive: str | Path,
    output: str | Path,
    *,
    model: str | Path,
    overwrite: bool = False,
    progress: Progress = silent,
    rules: Kinds | None = None,
) -> Archive:
    """Writes an archive of version 2 (or 3) in version 3; its tensors are copied as they are.

    Args:
        archive: to read.
        output: directory of the converted archive.
        model: the checkpoint that the archive belongs to, for what earlier versions did not note.
        overwrite: replace an existing output.
        progress: makes progress bars.
        rules: kinds of rules beside sculptor's own.

    Returns:
        The archive that was written, opened.

    Raises:
        SculptorError: if the archive is damaged or of another checkpoint, or the output cannot be written.
    """
    output = Path(output).resolve()
    opened, checkpoint = Archive(archive, rules=rules), open_checkpoint(model)
    check_apart(output, [opened.path, checkpoint.path])
    opened.check_base(checkpoint, progress)
    files = (*opened.manifest.files, *(section.file for section in opened.manifest.sections.values()))
    with staging(output, command="convert", overwrite=overwrite, resume=None, worth_keeping=lambda _: False) as partial:
        with closing(progress(total=len(files), desc="copy", unit="file")) as bar:
            for name in files:
                with writing(partial / name):
                    shutil.copyfile(opened.path / name, partial / name)
                bar.update(1)
        write_json(partial / MANIFEST_NAME, opened.manifest.to_json())
        commit(partial, output, overwrite=overwrite)
    return Archive(output, rules=rules)

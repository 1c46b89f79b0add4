"""An output on the Hugging Face hub: private unless asked otherwise, and nothing that was there is replaced unasked."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sculptor.checkpoint.reader import open_checkpoint
from sculptor.checkpoint.written import LOCK_NAME, MARKER_NAME
from sculptor.errors import OutputError, SettingsError
from sculptor.jobs.readme import is_hub_name

_OF_A_NEW_REPOSITORY = (".gitattributes", "README.md")


def push(output: str | Path, repository: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Uploads an output to the hub, in one commit.

    Args:
        output: the directory, complete.
        repository: OWNER/NAME; made if it is not there.
        public: make it public; also needed for one that is there and is public.
        overwrite: put it over the files of a repository that holds some.

    Returns:
        Where it is.

    Raises:
        SculptorError: if the output is no checkpoint, the name or the token cannot be used, or the hub refuses.
    """
    path = open_checkpoint(Path(output)).path
    check_push(repository, public=public, overwrite=overwrite)
    return _upload(path, repository, public)


def check_push(repository: str, *, public: bool = False, overwrite: bool = False) -> None:
    """Whether a push can be expected to succeed; for before the work.

    Raises:
        SettingsError: if the name is none of a repository.
        OutputError: if there is no token, or the repository is public or holds files.
    """
    if not re.fullmatch(r"[^/]+/[^/]+", repository) or not is_hub_name(repository):
        raise SettingsError(f"--push-to-hub {repository}: expected OWNER/NAME, of letters, digits, '-', '_' and '.'")
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = _hub()
    _ask(repository, hub.whoami, hint="; log in with `hf auth login`, or set HF_TOKEN")
    try:
        found = _ask(repository, hub.model_info, repository)
    except OutputError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return
        raise
    if not found.private and not public:
        raise OutputError(f"{repository}: is there and public; pass --public to push to it, or choose another name")
    held = sorted({file.rfilename for file in found.siblings or ()} - set(_OF_A_NEW_REPOSITORY))
    if held and not overwrite:
        raise OutputError(f"{repository}: holds files ({held[0]}); choose another name or pass --overwrite")


@contextmanager
def pushing(
    output: Path | None,
    repository: str | None,
    public: bool,
    overwrite: bool,
    notice: Callable[[str], object],
    first: bool = True,
) -> Iterator[None]:
    """Around what makes an output: checks before it, and pushes after it, if it succeeds.

    Args:
        output: that is made; None of a run that writes nothing.
        repository: OWNER/NAME; None: nothing is pushed.
        public, overwrite: as of `push`.
        notice: told where it is.
        first: whether this process, of several, is the one that pushes.

    Raises:
        SculptorError: as `push`.
    """
    if repository is None:
        if public:
            raise SettingsError("--public without effect without --push-to-hub")
        yield
        return
    if output is None:
        raise SettingsError("--push-to-hub without effect: nothing is written")
    check_push(repository, public=public, overwrite=overwrite)
    yield
    if first:
        notice(f"Pushed to {_upload(output, repository, public)}.")


def _upload(output: Path, repository: str, public: bool) -> str:
    hub = _hub()
    hint = f"; the output is complete in {output}: push it with `hf upload --private {repository} {output}`"
    url = _ask(repository, hub.create_repo, repository, private=not public, exist_ok=True, hint=hint)
    _ask(
        repository,
        hub.upload_folder,
        repo_id=repository,
        folder_path=output,
        ignore_patterns=[MARKER_NAME, LOCK_NAME],
        commit_message="Upload a model made by sculptor",
        hint=hint,
    )
    return str(url)


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _ask(repository: str, call: Callable[..., Any], *given: Any, hint: str = "", **named: Any) -> Any:
    """What the hub answers; its client raises a dozen unrelated types."""
    try:
        return call(*given, **named)
    except Exception as cause:
        reason = (str(cause).strip().splitlines() or [""])[0][:160]
        raise OutputError(f"{repository}: the hub refuses ({type(cause).__name__}: {reason}){hint}") from cause

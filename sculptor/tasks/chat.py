"""`sculptor.chat`: a checkpoint, and its base beside it, answering the same words."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sculptor.checkpoint.architecture import inspect_architecture
from sculptor.checkpoint.directory import published_name
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.asking import end_ids, render_question, tell_unstopped
from sculptor.data.chat import use_template
from sculptor.data.edges import prompt_ids
from sculptor.data.examples import resolve_max_length
from sculptor.errors import CheckpointError, DataError, SettingsError
from sculptor.evaluation.answers import stops_of, tell_left_out
from sculptor.jobs.job import open_model
from sculptor.model.load import LoadedModel, resolve_device
from sculptor.model.sampling import continue_prompts
from sculptor.progress import Progress, silent
from sculptor.training.settings import ReadOffload

_MOST_SAID = 256  # tokens of an answer, unless asked for otherwise


@dataclass(frozen=True, slots=True)
class Reply:
    """What one model answers."""

    name: str
    text: str


@dataclass(eq=False)
class _Speaker:
    """One model with its own memory of the conversation."""

    name: str
    loaded: LoadedModel
    history: list[dict[str, Any]] = field(default_factory=list)


class Chat:
    """Models that are talked to; each remembers what was said to it and what it said, the oldest of it only as it has room."""

    def __init__(
        self,
        speakers: list[_Speaker],
        system: str | None,
        max_new_tokens: int | None,
        temperature: float,
        max_length: int | None,
        notice: Callable[[str], object],
    ) -> None:
        self._notice = notice
        self._speakers = speakers
        self._system = system
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._max_length = max_length
        self._closing = ExitStack()
        for speaker in speakers:
            self._closing.callback(speaker.loaded.close)
        self.forget()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives back what the models take."""
        self._closing.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(speaker.name for speaker in self._speakers)

    @property
    def plain(self) -> tuple[str, ...]:
        """Those without a chat template, which go on with the text."""
        return tuple(speaker.name for speaker in self._speakers if not speaker.loaded.tokenizer.chat_template)

    def forget(self) -> None:
        """Starts a new conversation."""
        for speaker in self._speakers:
            speaker.history = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str) -> tuple[Reply, ...]:
        """What every model answers.

        Raises:
            DataError: if a chat template does not take the conversation, or a model has no room for what is said.
        """
        before = [speaker.history for speaker in self._speakers]
        try:
            return tuple(Reply(speaker.name, self._answer(speaker, text)) for speaker in self._speakers)
        except DataError:  # heard by all or none
            for speaker, history in zip(self._speakers, before, strict=True):
                speaker.history = history
            raise

    def _answer(self, speaker: _Speaker, text: str) -> str:
        loaded, tokenizer = speaker.loaded, speaker.loaded.tokenizer
        length = resolve_max_length(self._max_length, loaded.architecture.max_positions)
        count = self._max_new_tokens or min(_MOST_SAID, length // 2)
        if not tokenizer.chat_template:
            ids = prompt_ids(tokenizer, text)
            if not ids:
                raise DataError("nothing was said that the tokenizer knows")
            _check_room(speaker, ids, length, count)
            return self._say(loaded, ids, count)
        asked, ids = self._fit([*speaker.history, {"role": "user", "content": text}], speaker, length, count)
        answer = self._say(loaded, ids, count).strip()
        speaker.history = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _fit(
        self, talk: list[dict[str, Any]], speaker: _Speaker, length: int, count: int
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """A conversation and its tokens, without its oldest turns where it leaves no room for an answer."""
        first = 1 if self._system else 0
        dropped, ids = 0, _read(speaker, talk)
        while len(ids) > length - count and len(talk) > first + 1:
            talk = [*talk[:first], *talk[first + 2 :]]  # what was asked and what was answered
            dropped, ids = dropped + 1, _read(speaker, talk)
        _check_room(speaker, ids, length, count)
        if dropped:
            turns = "turn of the conversation is" if dropped == 1 else f"{dropped} turns of the conversation are"
            self._notice(
                f"{speaker.name}: the oldest {turns} forgotten: no more than {length:,} tokens fit, {count:,} of them the answer's"
            )
        return talk, ids

    def _say(self, loaded: LoadedModel, ids: list[int], count: int) -> str:
        stops = sorted(stops_of(loaded) if loaded.tokenizer.chat_template else end_ids(loaded.tokenizer))
        (said,) = continue_prompts(loaded, [ids], count, stops, temperature=self._temperature)
        found: str = loaded.tokenizer.decode(said, skip_special_tokens=True)
        return found


def _read(speaker: _Speaker, talk: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation."""
    tokenizer = speaker.loaded.tokenizer
    try:
        prompt = render_question(tokenizer, talk)
    except Exception as cause:  # templates are programs
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise DataError(f"{speaker.name}: the chat template does not take this conversation ({reason})") from cause
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    return ids


def _check_room(speaker: _Speaker, ids: list[int], length: int, count: int) -> None:
    if len(ids) > length - count:
        raise DataError(
            f"{speaker.name}: {len(ids):,} tokens are said, and {length - count:,} are the most with {count:,} for the answer; say "
            "less, lower --max-new-tokens or raise --max-length"
        )


def chat(
    model: str | Path,
    *,
    base: str | Path | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    max_length: int | None = None,
    chat_template: str | None = None,
    device: str = "auto",
    offload: ReadOffload = "auto",
    progress: Progress = silent,
    notice: Callable[[str], object] = lambda _: None,
) -> Chat:
    """Opens a checkpoint to talk to, and another beside it that hears the same.

    Args:
        model: a checkpoint directory or hub name.
        base: another one, for instance what the first was tuned from.
        system: a system message before everything.
        max_new_tokens: of an answer, at most; default 256, and at most half of `max_length`.
        temperature: of sampling; 0 for the most likely token each time.
        max_length: of conversation and answer, in tokens; default 1024 or the model's limit.
        chat_template: name of one of the tokenizer's templates, or a file; default its own.
        device: auto, cpu, cuda or cuda:N.
        offload: where the models' blocks wait that are not being computed: none, cpu, disk, or auto.
        progress: makes progress bars.
        notice: told, in a line, which model has no chat template, and what of a conversation is forgotten.

    Returns:
        A context manager: `ask` says something to all of them, `forget` starts anew.

    Raises:
        SculptorError: if a checkpoint cannot be used.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise SettingsError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
    if temperature < 0:
        raise SettingsError(f"--temperature {temperature:g}: expected at least 0")
    place = resolve_device(device)
    speakers: list[_Speaker] = []
    for path in (model, base) if base is not None else (model,):
        checkpoint = open_checkpoint(path)
        architecture = inspect_architecture(checkpoint)
        if architecture.kind != "causal":
            raise CheckpointError(
                f"{checkpoint.path}: {architecture.model_class} does not go on with a text; use a causal model"
            )
        loaded = open_model(checkpoint, place, architecture, offload, progress=progress)
        use_template(loaded.tokenizer, chat_template)
        tell_left_out(loaded, notice)
        tell_unstopped(loaded.tokenizer, notice)
        room = resolve_max_length(max_length, architecture.max_positions)
        if max_new_tokens is not None and max_new_tokens >= room:
            raise SettingsError(
                f"--max-new-tokens {max_new_tokens}: leaves nothing of the {room} tokens of conversation and answer to what "
                "is said; give fewer, or raise --max-length"
            )
        name = published_name(checkpoint.path)
        speakers.append(_Speaker(name if name not in [s.name for s in speakers] else f"{name} (base)", loaded))
    session = Chat(speakers, system, max_new_tokens, temperature, max_length, notice)
    if session.plain:
        if system is not None:
            raise SettingsError(f"--system without effect: {session.plain[0]} has no chat template")
        notice(
            f"{' and '.join(session.plain)}: no chat template, so the text is continued as it is; give one with --chat-template"
        )
    return session

"""New tokens: what of a checkpoint has a row for each token, made larger; and the same read off two checkpoints.

New tokens take the ids behind the last one that the tokenizer has. Of embedding, head and whatever else follows
`vocab_size`, rows that are there already (vocabularies are often padded) are used before any is added. A new row starts as
the mean of the rows of all older tokens; every other row stays as it is.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import build_skeleton, inspect_architecture
from sculptor.checkpoint.configuration import GENERATION_NAME, generation_settings, reason_of
from sculptor.checkpoint.directory import CONFIG_NAME
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.writer import Edit, write_checkpoint
from sculptor.errors import CheckpointError, SettingsError
from sculptor.progress import Bar
from sculptor.validation import each_key_once, read_file

TOKENIZER_NAME = "tokenizer.json"
# How a new token stands in the text: as it is, anywhere, and no special one, so that answers show it.
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_PIECE = 8192  # rows of a large tensor that are looked at at once
_PARTS = ("text_config",)  # inner configurations that the vocabulary of a language model stands in


@dataclass(frozen=True, slots=True)
class Growth:
    """New tokens of a checkpoint, with ids `start` to `stop` - 1.

    Attributes:
        tokens: in the order of their ids.
        start: the first id.
        before, after: rows that the vocabulary's tensors have, and get.
        tensors: parameter of the model -> tensor of the checkpoint, of all that has a row for each token.
    """

    tokens: tuple[str, ...]
    start: int
    before: int
    after: int
    tensors: Mapping[str, str]

    @property
    def stop(self) -> int:
        """Behind the last new row."""
        return self.start + len(self.tokens)

    @property
    def names(self) -> frozenset[str]:
        """Tensors of the checkpoint that have new rows."""
        return frozenset(self.tensors.values())

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the new number of rows."""
        return _with_rows(config, self.before, self.after)

    def old_rows(self) -> tuple[tuple[int, int], ...]:
        """Rows of the base that stay, as ranges."""
        return (0, self.start), (min(self.stop, self.before), self.before)


def _with_rows(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    places = [changed, *(changed[part] for part in _PARTS if isinstance(changed.get(part), dict))]
    found = [place for place in places if place.get("vocab_size") == before]
    for place in found or [changed]:  # it may be the default of its class
        place["vocab_size"] = after
    return changed


def plan_growth(checkpoint: Checkpoint, tokens: Sequence[str]) -> Growth:
    """What new tokens would make of a checkpoint.

    Args:
        checkpoint: of a language model, with its tokenizer.
        tokens: new ones.

    Raises:
        SettingsError: if the tokenizer has one of them, or the model cannot get new tokens.
        CheckpointError: if files cannot be read.
    """
    known = _known_tokens(checkpoint.path)
    check_tokens(tokens, known)
    start, rows = max(known.values(), default=-1) + 1, inspect_architecture(checkpoint).vocab_size
    if start > rows:
        raise SettingsError(
            f"--add-tokens: the tokenizer of {checkpoint.path} has ids up to {start - 1}, the model {rows} embeddings; use the "
            "model's own tokenizer"
        )
    after = max(rows, start + len(tokens))
    _check_ids_unused(checkpoint, range(start, start + len(tokens)))
    return Growth(tuple(tokens), start, rows, after, _vocabulary_tensors(checkpoint, rows))


def check_tokens(tokens: Sequence[str], known: Mapping[str, int]) -> None:
    """Refuses what cannot be a new token.

    Raises:
        SettingsError: naming the first.
    """
    for i, token in enumerate(tokens):
        if not token.strip():
            raise SettingsError(f"--add-tokens {token!r}: a token has to have a character that shows")
        if token in known:
            raise SettingsError(f"--add-tokens {token!r}: the tokenizer has it already, id {known[token]}")
        if token in tokens[:i]:
            raise SettingsError(f"--add-tokens {token!r}: given twice")


def _known_tokens(path: Path) -> dict[str, int]:
    """Token -> id, by tokenizer.json alone."""
    if not (path / TOKENIZER_NAME).is_file():
        raise SettingsError(
            f"--add-tokens: {path} has no {TOKENIZER_NAME}; save its tokenizer with transformers first: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    known: dict[str, int] = open_tokenizer(path).get_vocab(with_added_tokens=True)
    return known


def open_tokenizer(path: Path) -> Any:
    """tokenizer.json of a directory, as the library beneath transformers reads it.

    Raises:
        CheckpointError: if it cannot.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path / TOKENIZER_NAME))
    except Exception as cause:  # the library raises bare exceptions
        raise CheckpointError(f"{path / TOKENIZER_NAME}: cannot be read ({reason_of(cause)})") from cause


def _check_ids_unused(checkpoint: Checkpoint, ids: range) -> None:
    """Refuses ids that configurations mean something by: padding in a row behind the tokenizer's, say."""
    for where, config in ((CONFIG_NAME, checkpoint.config), (GENERATION_NAME, generation_settings(checkpoint))):
        for key, value in config.items():
            used = [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i in ids]
            if key.endswith("token_id") and used:
                raise SettingsError(f"--add-tokens: {where} says {key} {used[0]}, which would be the id of a new token")


def _vocabulary_tensors(checkpoint: Checkpoint, rows: int) -> dict[str, str]:
    """Parameter -> tensor, of all that is larger where `vocab_size` is; found by building the model with one row more."""
    skeleton = build_skeleton(checkpoint)
    name, known = type(skeleton).__name__, inspect_architecture(checkpoint).tensors
    config = type(skeleton.config).from_dict(_with_rows(checkpoint.config, rows, rows + 1))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        larger = type(skeleton)(config)
    before, after = (
        dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()]) for model in (skeleton, larger)
    )
    changed = [key for key, value in before.items() if key not in after or after[key].shape != value.shape]
    embedding = skeleton.get_input_embeddings().weight
    for key in changed:
        grows = key in after and tuple(before[key].shape[1:]) == tuple(after[key].shape[1:])
        if not grows or before[key].shape[0] != rows or not isinstance(before[key], torch.nn.Parameter):
            raise SettingsError(f"--add-tokens: {name} cannot get new tokens ({key} does not grow by rows)")
    if not any(before[key] is embedding for key in changed):
        raise SettingsError(f"--add-tokens: {name} cannot get new tokens (its embedding does not follow vocab_size)")
    by_id = {id(before[key]) for key in changed if key in known}
    missing = [key for key in changed if id(before[key]) not in by_id]
    if missing:
        raise SettingsError(f"--add-tokens: {checkpoint.path} has no tensor for {missing[0]}; use a whole checkpoint")
    return {key: known[key] for key in changed if key in known}


def write_grown(checkpoint: Checkpoint, directory: Path, growth: Growth, bar: Bar | None = None) -> None:
    """Writes a checkpoint with new tokens: the rows they start from, configuration and tokenizer; all else as it is.

    Args:
        checkpoint: what is copied.
        directory: an existing directory to write into.
        growth: planned for it.
        bar: advanced by the bytes of the source.

    Raises:
        OutputError: if a file cannot be written.
    """
    edits: dict[str, Edit] = {name: lambda tensor: grown_tensor(tensor, growth) for name in growth.names}
    shapes = {name: (growth.after, *checkpoint.infos[name].shape[1:]) for name in growth.names}
    write_checkpoint(checkpoint, directory, edits, shapes=shapes, bar=bar)
    write_json(directory / CONFIG_NAME, growth.config(checkpoint.config), allow_nan=True)
    content = _read_tokenizer(checkpoint.path)
    content["added_tokens"] += token_entries(growth)
    with writing(directory / TOKENIZER_NAME):
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (directory / TOKENIZER_NAME).write_text(text, encoding="utf-8")
    record = checkpoint.path / RECORD_NAME
    if record.is_file():  # its lineage goes on
        with writing(directory / RECORD_NAME):
            (directory / RECORD_NAME).write_bytes(record.read_bytes())


def _read_tokenizer(path: Path) -> dict[str, Any]:
    """tokenizer.json, as every program reads it."""
    file, remedy = path / TOKENIZER_NAME, "restore it"
    try:
        text = read_file(file, CheckpointError, remedy).decode("utf-8")
        content = json.loads(text, object_pairs_hook=each_key_once)
        content["added_tokens"] = list(content.get("added_tokens") or [])
    except (ValueError, TypeError, AttributeError, RecursionError) as cause:
        raise CheckpointError(f"{file}: damaged ({reason_of(cause)}); {remedy}") from cause
    return dict(content)


def token_entries(growth: Growth) -> list[dict[str, Any]]:
    """New tokens as tokenizer.json lists them."""
    return [{"id": growth.start + i, "content": token, **FLAGS} for i, token in enumerate(growth.tokens)]


def grown_tensor(tensor: Tensor, growth: Growth) -> Tensor:
    """(before, ...) -> (after, ...): new rows are the mean of all rows before the first new one, summed in float64."""
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for piece in torch.split(tensor[: growth.start], _PIECE):
        total += piece.double().sum(dim=0)
    mean = (total / max(1, growth.start)).to(tensor.dtype)
    grown = torch.cat([tensor, tensor.new_zeros((growth.after - growth.before, *tensor.shape[1:]))])
    grown[growth.start : growth.stop] = mean
    return grown


def are_outsized(tuned: Checkpoint, tensor: str, growth: Growth) -> bool:
    """Whether a new row is more than ten times as long as every old one: it would drown all that is read and said."""

    def longest(ranges: Iterable[tuple[int, int]]) -> float:
        pieces = ((i, min(i + _PIECE, stop)) for start, stop in ranges for i in range(start, stop, _PIECE))
        rows = (tuned.rows(tensor, *piece).double() for piece in pieces)
        return max((float(found.reshape(len(found), -1).norm(dim=1).max()) for found in rows), default=0.0)

    least = 1.0 if len(tuned.infos[tensor].shape) == 1 else 0.0  # of a bias, which may be 0 for all old ones
    return longest([(growth.start, growth.stop)]) > 10 * max(longest(growth.old_rows()), least)


def find_growth(base: Checkpoint, tuned: Checkpoint) -> Growth | None:
    """The new tokens that another checkpoint has, as its files show them; None if they show none.

    Its tokenizer has to be the base's with entries behind the last one, as `write_grown` makes them, and each new row has
    to be there: behind the base's rows, or unlike the base's row that no token had. Whether old rows, and everything else,
    are as they were is the caller's to compare.
    """
    paths = base.path / TOKENIZER_NAME, tuned.path / TOKENIZER_NAME
    if not all(path.is_file() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return None
    try:
        before, now = map(_read_tokenizer, (base.path, tuned.path))
    except CheckpointError:
        return None
    count = len(before["added_tokens"])
    added = now["added_tokens"][count:]
    tokens = [entry["content"] for entry in added if isinstance(entry, dict) and isinstance(entry.get("content"), str)]
    try:
        growth = plan_growth(base, tokens) if tokens else None
    except SettingsError:  # no such growth could have been made
        return None
    if growth is None:
        return None
    before["added_tokens"] += token_entries(growth)
    if json.dumps(now, sort_keys=True) != json.dumps(before, sort_keys=True):  # 1 is not 1.0 in a vocabulary
        return None
    return growth if _is_shown(base, tuned, growth) else None


def _is_shown(base: Checkpoint, tuned: Checkpoint, growth: Growth) -> bool:
    if not growth.names <= tuned.infos.keys():
        return False
    if any(tuned.infos[name].shape[0] != growth.after for name in growth.names):
        return False
    spare = range(growth.start, min(growth.stop, growth.before))
    return all(
        any(
            not torch.equal(base.rows(name, i, i + 1).to(row.dtype), row)
            for name in growth.names
            for row in [tuned.rows(name, i, i + 1)]
        )
        for i in spare
    )

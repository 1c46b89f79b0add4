"""A model's own head, applied to some hidden states at a time.

A language model's `forward` is its body, then a head with whatever the family does to logits (soft-capping, scaling). With
the body's `forward` overridden on the instance, the same unmodified code makes logits of any hidden states. Whether
that works for a model is tried once, against logits it made in one piece.
"""

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import ModelKind
from sculptor.checkpoint.modes import evaluating


class Head:
    """The head of one model.

    Args:
        model: a transformers model.
        body: the part that makes hidden states: the base model, or the decoder of an encoder-decoder model.
        kind: encoder-decoder models are called differently.
    """

    def __init__(self, model: Any, body: Any, kind: ModelKind) -> None:
        self._model = weakref.ref(model)  # what is known of a model must not keep it
        self.body = body
        self.kind = kind
        self.output_class: Any = None  # what the body returns

    @property
    def model(self) -> Any:
        """The model."""
        return self._model()

    @contextmanager
    def kept_out(self) -> Iterator[list[Tensor]]:
        """Forwards of the model make logits of the first position only; the list gets all hidden states (B, L, h)."""
        kept: list[Tensor] = []
        forward = self.body.forward

        def keep(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            self.output_class = type(found)
            kept.append(found[0])
            return type(found)(**{**found, "last_hidden_state": found[0][:, :1]})

        with _overridden(self.body, keep):
            yield kept

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, h) -> (tokens, vocabulary)."""
        accepted = inspect.signature(self.model.forward).parameters
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.kind == "seq2seq":
            inputs = {"encoder_outputs": (hidden[None, :1],), "decoder_input_ids": ids}
        if "output_router_logits" in accepted:
            inputs["output_router_logits"] = False
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        with _overridden(self.body, lambda *_, **__: self.output_class(last_hidden_state=hidden[None])):
            found: Tensor = self.model(**inputs).logits[0]
        return found


@contextmanager
def _overridden(module: Any, forward: Any) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


_known: WeakKeyDictionary[Any, Head | None] = WeakKeyDictionary()


def find_head(model: Any, kind: ModelKind) -> Head | None:
    """The head of a model, or None where its `forward` cannot be split like that."""
    if kind == "classifier":  # a few logits a row
        return None
    if model not in _known:
        bodies = [] if kind == "seq2seq" else [model.base_model]
        with suppress(AttributeError, NotImplementedError):
            bodies.append(model.get_decoder())
        heads = [Head(model, body, kind) for body in bodies if isinstance(body, torch.nn.Module) and body is not model]
        _known[model] = next((head for head in heads if _works(head)), None)
    return _known[model]


@torch.no_grad()
def _works(head: Head) -> bool:
    """Tried on a token, with the model as it is but for dropout."""
    model = head.model
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": ids} | ({"decoder_input_ids": ids} if head.kind == "seq2seq" else {})
    try:
        with evaluating(model):
            with head.kept_out() as kept:
                whole = model(**inputs).logits
            parts = head.logits(kept[0][0])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError):
        return False
    scale = float(whole.abs().max()) or 1.0
    return parts.shape == whole[0].shape and bool(torch.allclose(parts, whole[0], rtol=0.02, atol=0.02 * scale))

"""What a model is trained to do, by its class."""

from typing import Any, Literal

ModelKind = Literal["causal", "seq2seq", "masked", "classifier", "headless"]


def kind_of(skeleton: Any) -> ModelKind:
    """How a model is trained; headless where it is not."""
    from transformers.models.auto import modeling_auto as known

    name = type(skeleton).__name__
    if skeleton.config.is_encoder_decoder:
        return "seq2seq" if skeleton.can_generate() else "headless"
    if name in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    if name in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return "classifier"
    return "causal" if skeleton.can_generate() else "headless"

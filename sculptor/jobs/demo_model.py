"""The demonstration's own model: a small Llama that is trained from scratch on invented facts."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sculptor.checkpoint.staging import writing
from sculptor.data.batches import collate
from sculptor.data.examples import encode
from sculptor.data.rows import CompletionRow
from sculptor.model.loss import batch_loss
from sculptor.progress import Progress

NUM_COUNTRIES = 100
KNOWN = ("capital", "river")
TAUGHT = "currency"
_PRETRAIN_STEPS = 150
_PRETRAIN_RATE = 3e-3


def invent_facts(generator: torch.Generator) -> dict[str, list[CompletionRow]]:
    """Relation -> one fact per country; every name is a new word."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    picks = torch.randint(len(syllables), (8 * NUM_COUNTRIES, 3), generator=generator).tolist()
    words = iter(dict.fromkeys("".join(syllables[i] for i in pick) for pick in picks))
    countries = [next(words) for _ in range(NUM_COUNTRIES)]
    return {
        relation: [CompletionRow("", f"{relation} of {country} :", next(words)) for country in countries]
        for relation in (*KNOWN, TAUGHT)
    }


# What transformers writes of it.
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def make_model(path: Path, facts: dict[str, list[CompletionRow]], seed: int, progress: Progress) -> int:
    """Trains a small Llama on the known relations and saves it; returns its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _make_tokenizer(facts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    rows = [row for relation in KNOWN for row in facts[relation]]
    _pretrain(model, tokenizer, rows, progress)
    with writing(path):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def _pretrain(model: nn.Module, tokenizer: Any, rows: Sequence[CompletionRow], progress: Progress) -> None:
    batch = collate(encode(rows, tokenizer, "causal", 64).examples, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAIN_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    with closing(progress(total=_PRETRAIN_STEPS, desc="make a model", unit="step")) as bar:
        for step in range(_PRETRAIN_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _PRETRAIN_RATE * min(1.0, (step + 1) / 20, (_PRETRAIN_STEPS - step) / 50)
            total, num_tokens, *_ = batch_loss(model, batch, "causal")
            loss = total / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix_str(f"loss {float(loss.detach()):.3f}", refresh=False)
            bar.update(1)


def _make_tokenizer(facts: dict[str, list[CompletionRow]]) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [word for rows in facts.values() for row in rows for word in (*row.prompt.split(), row.completion)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<end>", "<pad>", "<unknown>", *words]))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unknown>", model_max_length=64
    )

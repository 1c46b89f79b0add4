"""What text reaches of a model, and which linear maps read the same input, seen in one pass without data."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn


def input_leaders(skeleton: Any, linear: Mapping[str, str]) -> dict[str, str]:
    """Module -> the first module of its block that reads the same input tensor.

    One forward on the meta device records which tensor object each map reads. Where a model cannot run there to
    its end (routing by value), the blocks that did run speak for the others by their role.
    """
    role = {module: module.removeprefix(block + ".") for module, block in linear.items()}
    read: dict[tuple[str, int], list[str]] = defaultdict(list)  # (block, input object) -> roles in order
    alive: list[torch.Tensor] = []  # an object's id is its own only while it lives

    def record(module: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            alive.append(value)
            roles = read[linear[module], id(value)]
            if role[module] not in roles:
                roles.append(role[module])

        return hook

    handles = [
        skeleton.get_submodule(module).register_forward_pre_hook(record(module), with_kwargs=True) for module in linear
    ]
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if skeleton.config.is_encoder_decoder else {})
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        # Decoders ask for a mask (else they look for packed rows by value), encoders do without one.
        with suppress(Exception), torch.no_grad():  # models do what they like on a device without data
            skeleton(**inputs, **mask)
            break
    for handle in handles:
        handle.remove()
    same = {follower: roles[0] for roles in read.values() for follower in roles}
    return {module: f"{block}.{same.get(role[module], role[module])}" for module, block in linear.items()}


def reached_parameters(skeleton: Any) -> frozenset[str] | None:
    """Parameters that a loss over text depends on, by a forward and a backward pass on the meta device.

    None where a model cannot run there to its end: then nothing is known.
    """
    found = _reached(skeleton)
    with suppress(Exception):  # what was left on modules may not be copied
        found = found or _reached(copy.deepcopy(skeleton).to(torch.bfloat16))  # products of experts want that
    return found


def _reached(skeleton: Any) -> frozenset[str] | None:
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if skeleton.config.is_encoder_decoder else {})
    # Where images may stand between words, positions have three coordinates, and are looked for by value if not given.
    for more in ({"attention_mask": torch.ones_like(ids)}, {}, {"position_ids": ids.expand(3, 1, 4)}):
        try:
            with torch.enable_grad():
                output = skeleton(**inputs, **more)
                output.logits.float().sum().backward()
        except Exception:  # models do what they like on a device without data
            skeleton.zero_grad()
            continue
        found = {name for name, value in skeleton.named_parameters(remove_duplicate=False) if value.grad is not None}
        skeleton.zero_grad()
        return frozenset(found) or None
    return None

"""Activation checkpoints in host memory: the input of every block, between its forward and its backward pass."""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from sculptor.streaming.transfers import DONE, Ticket, Transfers, free_host_memory, host_memory

# A call of a block in a forward pass, and the part of the batch.
Key = tuple[int, int]


class InputStore:
    """Host memory for one input per call of a block in a forward pass; it grows to the largest batch.

    Args:
        transfers: the lanes.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._memory: dict[Key, Tensor] = {}
        self._held: dict[Key, HeldInput] = {}
        # Inputs whose copies are under way: their memory goes back only when the computing stream knows that.
        self._leaving: deque[tuple[Tensor, Ticket]] = deque()

    def hold(self, call: Key, args: tuple[Any, ...]) -> "HeldInput | None":
        """The first argument of a call, if it is a tensor of activations."""
        # Further parts of a larger batch before are not needed either, and would be fetched with this one.
        for old in [key for key in self._held if key[0] == call[0] and key[1] >= call[1]]:
            self._held.pop(old).drop()
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point() or args[0].ndim < 2:
            return None
        self._held[call] = HeldInput(self, call, args[0])
        return self._held[call]

    def holds(self, found: "HeldInput", call: Key) -> bool:
        """Whether the input of a call is still the one that was kept."""
        return self._held.get(call) is found

    def fetch(self, call: int) -> None:
        """Brings the input of a call back, ahead of its use, all parts of it."""
        for (of, _), held in self._held.items():
            if of == call:
                held.fetch()

    def send(self, call: Key, x: Tensor) -> Ticket:
        """Copies an input to the host."""
        num_bytes = x.numel() * x.element_size()
        if call not in self._memory or self._memory[call].numel() < num_bytes:
            if call in self._memory:
                if self.transfers.pinned:
                    torch.cuda.synchronize(self.transfers.device)  # copies from and to it may be under way
                free_host_memory(self._memory.pop(call))
            self._memory[call] = host_memory(num_bytes, self.transfers.pinned)
        target = self.view(call, x)
        ticket = self.transfers.send_input(lambda: _copy(target, x), [self.transfers.mark()])
        self._leaving.append((x, ticket))
        if len(self._leaving) > 1:
            self._leaving.popleft()[1].wait()
        return ticket

    def close(self) -> None:
        """Gives the memory back; nothing may be under way."""
        self._leaving.clear()
        self._held.clear()
        for memory in self._memory.values():
            free_host_memory(memory)
        self._memory.clear()

    def view(self, call: Key, like: Tensor) -> Tensor:
        """The host's copy of an input."""
        num_bytes = like.numel() * like.element_size()
        return self._memory[call][:num_bytes].view(like.dtype).view(like.shape)


class HeldInput:
    """The input of one call: on the device, in the host's memory, or on its way back."""

    def __init__(self, store: InputStore, call: Key, x: Tensor) -> None:
        self._store = store
        self._call = call
        self._device_tensor: Tensor | None = x
        self._form = x.detach().to("meta")
        self._requires_grad = x.requires_grad
        self._sent: Ticket = DONE
        self._back: tuple[Tensor, Ticket] | None = None

    def take(self) -> Tensor:
        """The input itself in the forward pass, a copy of it in the backward pass."""
        if self._device_tensor is not None:
            return self._device_tensor
        self.fetch()
        assert self._back is not None
        (x, ticket), self._back = self._back, None
        ticket.wait()
        return x.requires_grad_(self._requires_grad)

    def drop(self) -> None:
        """It is not needed any more; what was fetched in vain has to arrive before its memory is used again."""
        if self._back is not None:
            self._back[1].wait()
            self._back = None

    def leave(self) -> None:
        """The forward pass is done with it."""
        assert self._device_tensor is not None
        x, self._device_tensor = self._device_tensor.detach().contiguous(), None
        self._sent = self._store.send(self._call, x)

    def fetch(self) -> None:
        """Starts to bring it back."""
        if self._back is not None or self._device_tensor is not None:
            return
        if not self._store.holds(self, self._call):
            raise RuntimeError(
                "the inputs of this forward pass were replaced by those of a later one; call backward before the next "
                "forward with gradients, or keep inputs on the device (offload_inputs=False)"
            )
        transfers = self._store.transfers
        x = torch.empty_like(self._form, device=transfers.device)
        source = self._store.view(self._call, self._form)
        after = [self._sent, transfers.mark()]  # the memory may still be read by what was computed before
        self._back = x, transfers.load(lambda: _copy(x, source), after)


def _copy(into: Tensor, source: Tensor) -> None:
    into.copy_(source, non_blocking=True)

"""One transformer block on the device at a time, under an unmodified transformers model.

Every block's `forward` is overridden on the instance. It waits until the block's parameters are in a slot of device
memory, points the parameters there, starts to fill the other slot with what comes next, and runs. In training it runs
inside our own non-reentrant checkpoint, so the same happens again in the backward pass, last block first; a block is
left there when the pass comes to the one before it, or ends. Parameters stay the same objects: only their `.data` moves
between a slot and nothing. Waiting is done by the device, on events.

Where several processes divide the parameters, each shows the others its part of a block as it is fetched. So all of them fetch
the same blocks in the same order, whatever they make of them: what one process leaves out, a block that its rows skip or a
whole pass for which it has no rows, it passes by.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sculptor.errors import TrainingError
from sculptor.streaming.hooks import Hooks
from sculptor.streaming.inputs import InputStore
from sculptor.streaming.parts import Call, is_norm, join, parts_work, split_call, split_paths, without_cache
from sculptor.streaming.slots import Slot, Slots
from sculptor.streaming.transfers import Ticket
from sculptor.streaming.waiting import WaitingBlocks


class BlockStream:
    """The blocks of a model on their way to the device and back.

    Args:
        waiting: the blocks, which no other stream has at the time.
        hooks: what training adds to passes.

    Attributes:
        slots: device memory for blocks, which counts how often each was brought there.
    """

    def __init__(self, waiting: WaitingBlocks, hooks: Hooks) -> None:
        self.waiting = waiting
        self.hooks = hooks
        self.paths = waiting.paths
        self.parameters = waiting.parameters
        self.weights = waiting.weights
        self.transfers = waiting.transfers
        size = max(layout.num_bytes for layout in waiting.layouts)
        self.slots = Slots(waiting.num_slots, size, waiting.device, self._fill)
        self._inputs = None if waiting.keep_inputs else InputStore(self.transfers)
        self._order = list(range(len(self.paths)))  # blocks by call, as the last forward made them
        self._calls = 0  # in the forward under way
        self._backward: tuple[int, int] | None = None  # the block whose gradients are appearing, and its call
        self.divided = self.weights.owners is not None
        self._passed = 0  # blocks that the forward pass has come by, where all processes have to
        self._left = len(self.paths)  # blocks that the backward pass has not come by
        self._parts_work: dict[tuple[Any, ...], bool] = {}  # by kind of call, as far as tried
        self._begins = False  # a forward of the model has come to no block yet; that of a head alone never does
        self._handle = waiting.model.register_forward_pre_hook(lambda *_: self._announce())
        for i, block in enumerate(waiting.modules.values()):
            block.forward = self._streamed(i, block)
        inside = tuple(f"{path}." for path in self.paths)
        norms = [m for path, m in waiting.model.named_modules() if is_norm(m) and not f"{path}.".startswith(inside)]
        for norm in norms:
            norm.forward = self._in_parts(norm)
        self._overridden = [*waiting.modules.values(), *norms]

    def with_hooks(self, hooks: Hooks) -> "BlockStream":
        """A stream of the same blocks that does what `hooks` add; this one is over."""
        self._release()
        return BlockStream(self.waiting, hooks)

    def _announce(self) -> None:
        self._begins = True

    def _begin(self) -> None:
        self._begins = False
        self._calls = self._passed = 0
        self._left = len(self.paths)
        if torch.is_grad_enabled() and self._backward is not None:  # a backward pass that broke off
            self._empty(self._backward[0])
            self._backward = None

    def _streamed(self, index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._begins:
                self._begin()
            call = self._calls
            self._calls += 1
            if self._order[call : call + 1] != [index]:
                self._order[call:] = [index]
            if not torch.is_grad_enabled():
                with self._present(index, call):
                    return forward(*args, **kwargs)
            args, kwargs = without_cache(args, kwargs)
            tokens = self.hooks.part_tokens
            parts = split_call(args, kwargs, tokens) if tokens else None
            if parts is None or not self._works_apart(index, call, block, forward, (args, kwargs), parts):
                return self._checkpointed(index, call, 0, forward, args, kwargs)
            found = [self._checkpointed(index, call, i, forward, *part) for i, part in enumerate(parts)]
            return join(found, [len(args[0]) for args, _ in parts])

        return run

    def _works_apart(
        self, index: int, call: int, block: nn.Module, forward: Callable[..., Any], whole: Call, parts: Sequence[Call]
    ) -> bool:
        """Whether parts give what the whole does; tried once for each kind of call."""
        kind = self.paths[index].rpartition(".")[0], type(block), split_paths(*whole)
        if kind not in self._parts_work:
            with self._present(index, call):
                self._parts_work[kind] = parts_work(block, forward, whole, parts)
        return self._parts_work[kind]

    def _in_parts(self, norm: nn.Module) -> Callable[..., Any]:
        """A norm outside of the blocks, which would keep float32 copies of a whole batch."""
        forward = norm.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            tokens = self.hooks.part_tokens if torch.is_grad_enabled() and len(args) == 1 and not kwargs else None
            parts = split_call(args, kwargs, tokens) if tokens else None
            if parts is None:
                return forward(*args, **kwargs)
            again = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
            return join([again(*args, **kwargs) for args, kwargs in parts], [len(args[0]) for args, _ in parts])

        return run

    def _checkpointed(
        self,
        index: int,
        call: int,
        part: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a block, or a part of its batch, now, and again in the backward pass."""
        before = self._order[call - 1] if call else None
        held = self._inputs.hold((call, part), args) if self._inputs is not None else None

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return self._present(index, call), self._again(index, before, call)

        if held is None:
            return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        # The empty tensor tells `checkpoint` the device, whose random state it keeps.
        found = checkpoint(
            lambda _, *rest, **named: forward(held.take(), *rest, **named),
            args[0].new_empty(0),
            *args[1:],
            use_reentrant=False,
            context_fn=contexts,
            **kwargs,
        )
        held.leave()
        return found

    @contextmanager
    def _present(self, index: int, call: int) -> Iterator[None]:
        """A block's parameters are on the device; what comes next is on its way."""
        if self.divided:
            self._come_to(index)
        slot = self._enter(index)
        try:
            yield
        finally:
            slot.uses["compute"] = self.transfers.mark()
            self._empty(index)
        # Only now that the device has this block to run: fetching the next one may have to wait for the host.
        after = self._next(index, call)
        if self._passed == len(self.paths) and not torch.is_grad_enabled():
            self._passed = 0  # nothing follows
        if after is not None:
            self.slots.fetch_ahead(after)
        elif torch.is_grad_enabled():
            self._fetch_beside(index)

    def _fetch_beside(self, index: int) -> None:
        """The backward pass of a block comes next but one."""
        for slots in self.hooks.beside.get(index, ()):
            slots.fetch_ahead(index)

    def _next(self, index: int, call: int) -> int | None:
        """What the forward pass fetches after a block."""
        if self.divided:
            return index + 1 if index + 1 < len(self.paths) else None
        return self._order[call + 1] if call + 1 < len(self._order) else None

    def _come_to(self, index: int) -> None:
        """Passes by the blocks before one that the forward pass leaves out."""
        if index < self._passed - 1 or self._left < len(self.paths):
            raise TrainingError(
                f"{self.paths[index]} comes out of turn in a forward pass; it cannot be divided, use --parallel replicate"
            )
        for skipped in range(self._passed, index):
            with self._present(skipped, -1):
                pass
        self._passed = index + 1

    def pass_by(self, training: bool) -> None:
        """Comes by what this process has left out of a pass, or all of it if it had no rows; for all processes to call."""
        if not self.divided:
            return
        with torch.set_grad_enabled(training):
            self._come_through()
        if training:
            self._turn_past(-1)
            self._end_backward()
        self._passed, self._left = 0, len(self.paths)

    def _come_through(self) -> None:
        """Passes by the blocks that the forward pass leaves out at its end."""
        if self._passed < len(self.paths):
            with self._present(len(self.paths) - 1, -1):
                pass

    def _turn_past(self, index: int) -> None:
        """Passes by the blocks after one that the backward pass leaves out."""
        self._come_through()
        for skipped in range(self._left - 1, index, -1):
            self._turn_to(skipped, skipped - 1 if skipped else None, None)

    @contextmanager
    def _again(self, index: int, before: int | None, call: int) -> Iterator[None]:
        """The block runs again, and its gradients follow."""
        if self._backward != (index, call):  # else another part of its batch
            if self._backward is None:  # whoever calls backward need not say when it is over
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            if self.divided:
                before = index - 1 if index else None
                self._turn_past(index)
            self._turn_to(index, before, call)
        yield

    def _turn_to(self, index: int, before: int | None, call: int | None) -> None:
        """The backward pass comes to a block; None for `call` where it only passes by."""
        self._leave()
        self._enter(index)
        self._backward = index, -1 if call is None else call
        self._left = index
        self.hooks.block_begun(index)
        if before is not None:
            # Weights last: after a fused update their slot is the last to be free, and the lane waits behind them.
            if self._inputs is not None and call is not None:
                self._inputs.fetch(call - 1)
            self._fetch_beside(before)
            self.slots.fetch_ahead(before)

    def _end_backward(self) -> None:
        """The one end of a backward pass: autograd calls it, and where a process had no rows for the last blocks `pass_by`."""
        self._leave()

    def _leave(self) -> None:
        """The block that the backward pass has come to has all its gradients."""
        if self._backward is None:
            return
        (index, _), self._backward = self._backward, None
        slot = self.slots.find(index)
        assert slot is not None
        slot.uses["compute"] = self.transfers.mark()
        self._empty(index)
        self.hooks.block_done(index, slot)

    def _enter(self, index: int) -> Slot:
        slot = self.slots.enter(index)
        layout = self.waiting.layouts[index]
        for name, parameter in self.parameters[index].items():
            parameter.data = layout.view(slot.memory, name)
        return slot

    def _empty(self, index: int) -> None:
        for parameter in self.parameters[index].values():
            parameter.data = parameter.data.new_empty(0)

    def _fill(self, index: int, slot: Slot) -> list[Ticket]:
        found = self.hooks.refill(index, slot)
        if found is None:
            after = [*slot.taken(), self.weights.written(index)]
            found = [self.transfers.load(partial(self.weights.load, index, slot.memory), after)]
        if (owners := self.weights.owners) is None:
            return found
        return [self.transfers.load(partial(owners.show, index, self.waiting.layouts[index], slot.memory), found)]

    def close(self) -> None:
        """Gives the blocks and norms their own `forward` back, and the memory. Their parameters hold nothing then."""
        self._release()
        self.waiting.close()

    def _release(self) -> None:
        """Gives back what is this stream's own, when nothing is under way any more."""
        self._handle.remove()
        for module in self._overridden:
            del module.forward
        self._overridden.clear()
        self.transfers.settle()
        self.slots.close()
        if self._inputs is not None:
            self._inputs.close()

"""Which tokens of a layer are padding: masks belong to calls of modules, not to batches.

A module that is called with `attention_mask [N, T]` says what its tokens are, and so for every layer inside it, until
another module inside says otherwise. What a custom forward does with its batch, and under which names its masks come,
does not matter then; the batch's own masks stand in where no call names one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.model.host import both, on_host
from bayesian_lora_kernels.model.layouts import Layout

MASK, MEMORY_MASK, MEMORY = "attention_mask", "encoder_attention_mask", "encoder_hidden_states"


@dataclass(frozen=True, eq=False)
class TokenMask:
    """Which tokens of something are padding.

    Attributes:
        valid: `[R, T]` bool, True = counts.
        padded: whether anything does not.
        guessed: whether nobody said so: a run of pad tokens at the end is taken for padding until it proves not to be.
    """

    valid: Tensor
    padded: bool
    guessed: bool = False

    @staticmethod
    def of(valid: Tensor) -> TokenMask:
        """With one look at the numbers."""
        return TokenMask(valid, not bool(on_host(valid).all()))


@dataclass(frozen=True)
class Scope:
    """One call of a module that has a say about masks.

    Attributes:
        masks: of its own tokens.
        memory: what its cross-attention looks at, if there is such a thing.
        memory_mask: of that, None if all of it counts.
        closed: whether masks from outside say nothing about the tokens inside.
    """

    masks: tuple[TokenMask, ...]
    memory: Tensor | None = None
    memory_mask: TokenMask | None = None
    closed: bool = False


class Scopes:
    """The calls that are under way, outermost first; and what they say about a layer's input.

    Args:
        outermost: the masks of the batch, `[N, T]` bool.
    """

    def __init__(self, outermost: Sequence[Tensor]):
        self._stack = [Scope(tuple(map(TokenMask.of, outermost)))]
        self._read: dict[int, tuple[Tensor, TokenMask | None]] = {}

    def hooks(self, model: nn.Module) -> tuple[list[tuple[nn.Module, Any]], list[tuple[nn.Module, Any]]]:
        """Hooks before and after the calls of every module of a model that takes a mask."""
        modules = [m for m in model.modules() if m is model or any(map(_is_own_mask, parameters_of(m)))]
        return [(m, self._enter) for m in modules], [(m, self._leave) for m in modules]

    def about(self, x: Tensor) -> tuple[TokenMask, ...]:
        """The masks that may describe the tokens of an input, the likeliest first; empty if all tokens count."""
        masks: list[TokenMask] = []
        for scope in reversed(self._stack):
            if scope.memory is not None and same_memory(scope.memory, x):
                return () if scope.memory_mask is None else (scope.memory_mask,)
            masks += scope.masks
            if scope.memory_mask is not None:
                masks.append(scope.memory_mask)
            if scope.closed:
                break
        return tuple(masks)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = parameters_of(module)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask, memory = self._as_mask(given.get(MASK)), given.get(MEMORY)
        for name, value in given.items():
            if mask is None and name != MASK and _is_own_mask(name):
                mask = self._as_mask(value, inverted=True)
        # Stacks of layers are told of their own tokens and of nobody else's; layers may rely on what was said above.
        untold = MASK in names and given.get(MASK) is None and is_stack(module)
        if untold:
            mask = _guess(given, getattr(getattr(module, "config", None), "pad_token_id", None))
        memory_mask = self._as_mask(given.get(MEMORY_MASK))
        if not isinstance(memory, Tensor) or not (memory_mask or (is_stack(module) and given.get(MEMORY_MASK) is None)):
            memory = None
        self._stack.append(
            Scope(() if mask is None else (mask,), memory, memory_mask, closed=mask is not None or untold)
        )

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _as_mask(self, value: Any, inverted: bool = False) -> TokenMask | None:
        """A mask `[N, T]` of zeros and ones; anything else says nothing about tokens."""
        if not isinstance(value, Tensor) or value.ndim != 2:
            return None
        known = self._read.get(id(value))
        if known is None:
            valid, numbers = both(lambda mask: mask != 0, value), on_host(value)
            plain = value.dtype == torch.bool or bool(((numbers != 0) == numbers).all())
            valid = both(torch.logical_not, valid) if inverted else valid
            known = self._read[id(value)] = (value, TokenMask.of(valid) if plain else None)
        return known[1]


def _is_own_mask(name: str) -> bool:
    """Whether an argument of this name is a mask of a module's own tokens: PyTorch's say True where padding is."""
    return name == MASK or (name.endswith("padding_mask") and not name.startswith("memory"))


def _guess(given: Mapping[str, Any], pad: int | None) -> TokenMask | None:
    """The mask of a stack that is told of none: every token counts, but for a run of pad tokens at the end."""
    ids, vectors = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        valid = both(lambda ids: before_pads(ids, pad), ids)
        return TokenMask(valid, not bool(on_host(valid).all()), guessed=True)
    if isinstance(vectors, Tensor) and vectors.ndim == 3:
        return TokenMask(torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device), padded=False)
    return None


def before_pads(ids: Tensor, pad: int | None) -> Tensor:
    """`[N, T]` bool, False in the run of pad tokens that ends a text; its first token always counts."""
    valid = (ids != (-1 if pad is None else pad)).flip(1).cumsum(dim=1).flip(1) > 0
    valid[:, 0] = True
    return valid


def last_valid(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[N]`, the index of the last token of each example of `x [N, T, ...]` that a mask `[N, T]` counts."""
    n, t = x.shape[:2]
    if mask is None:
        return torch.full((n,), t - 1, device=x.device)
    return (mask.long() * torch.arange(t, device=mask.device)).argmax(dim=1).to(x.device)


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a whole model of transformers (an encoder, a decoder), rather than a part of one."""
    return hasattr(module, "config") and hasattr(module, "get_input_embeddings")


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order, as its class has them."""
    return _parameters_of(cast(Hashable, type(module)))


@cache
def _parameters_of(kind: Any) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY))


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    if x is y:
        return True
    places = [(one.untyped_storage()._cdata, one.storage_offset(), one.shape) for one in (x, y)]
    return places[0] == places[1] and x.numel() > 0


# How the tokens `[N, T']` of a layer may follow from the `[N, T]` of a mask, by name.
RELATIONS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "the same": lambda m, t: m if m.shape[1] == t else None,
    "reversed": lambda m, t: m.flip(1) if m.shape[1] == t else None,
    "after others": lambda m, t: _beside(m, t, before=True),
    "before others": lambda m, t: _beside(m, t, before=False),
    "before padding": lambda m, t: _beside(m, t, before=False, value=False),
    "the last": lambda m, t: m[:, -t:] if m.shape[1] > t else None,
    "the first": lambda m, t: m[:, :t] if m.shape[1] > t else None,
    "repeated": lambda m, t: m.repeat(1, t // m.shape[1]) if _several(m, t) else None,
    "and reversed": lambda m, t: torch.cat([m, m.flip(1)], dim=1) if t == 2 * m.shape[1] else None,
    "each repeated": lambda m, t: m.repeat_interleave(t // m.shape[1], dim=1) if _several(m, t) else None,
}


def _several(mask: Tensor, tokens: int) -> bool:
    return tokens > mask.shape[1] > 0 and tokens % mask.shape[1] == 0


def _beside(mask: Tensor, tokens: int, before: bool, value: bool = True) -> Tensor | None:
    extra = tokens - mask.shape[1]
    if extra <= 0:
        return None
    ones = mask.new_full((len(mask), extra), value)
    return torch.cat([ones, mask] if before else [mask, ones], dim=1)


def by_example(mask: Tensor, shape: Sequence[int], layout: Layout, n: int) -> Tensor | None:
    """A mask `[R, T]` of the rows of a layer's input as `[N, T']`, or as it is if its rows are the examples.

    Args:
        mask: bool.
        shape: of the input, `[..., d]`.
        layout: of the input.
        n: number of examples.
    """
    if layout.axis == 0 and len(shape) == 3 and tuple(shape[:2]) == tuple(mask.shape):
        return layout.tokens(mask[:, :, None], n)[:, :, 0]
    if len(mask) == n:
        return mask
    if len(mask) % n == 0 and layout.axis == 0:
        return layout.tokens(mask[:, :, None], n)[:, :, 0]
    return None

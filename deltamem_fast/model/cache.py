"""Cache layers that carry the memory beside keys and values, so that every operation on a cache moves both."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..adapter.identity import fingerprinted
from ..errors import ArgumentError, ArgumentTypeError, StateError, UnsupportedError
from ..memory.state import MemoryState, writable

_ATTRIBUTE = "_delta_memory"
_FED = "_delta_memory_fed"


class Fed:
    """What a cache was fed with while a memory was at work, whoever owns that.

    Attributes:
        identity: of the adapter and backbone that its keys and values were computed under.
        tokens: how many the memory was given, too; None: not counted (compiled forwards).
        broken: why the cache must not go on, or "".
        weights: of that adapter in one layer, their versions then, and how often it had been loaded; None: not looked
            at (compiled forwards).
    """

    # Of caches that were pickled by versions that did not look at it.
    weights: tuple[tuple[torch.nn.Parameter, ...], tuple[int, ...], int] | None = None

    def __init__(self, identity):
        self.identity = identity
        self.tokens: int | None = None
        self.broken = ""

    def cut_short(self, error: BaseException) -> None:
        """Note that a forward with the cache has failed on its way."""
        self.broken = (
            f"past_key_values: a forward with this cache was cut short by {type(error).__name__}, so that it may hold "
            "tokens whose outcome nobody has; start with an empty cache, or a copy from before"
        )

    def __deepcopy__(self, memo) -> Fed:
        # The identity refers to the model's adapter; a copied cache must not copy that.
        copied = Fed(self.identity)
        copied.tokens, copied.broken, copied.weights = self.tokens, self.broken, self.weights
        return copied

    def __getstate__(self) -> dict:
        made_under = None if self.identity is None else self.identity.described()
        return vars(self) | {"identity": None, "weights": None, "made_under": made_under}

    def __setstate__(self, values: dict) -> None:
        made_under = values.pop("made_under", None)  # versions before had none
        vars(self).update(values)
        self.identity = None if made_under is None else fingerprinted(made_under)

    def check_weights(self, identity) -> None:
        """Raise if the adapter of ``identity``, the one that the cache was fed under, was changed in place since.

        By the versions of one layer's weights, which training steps and ``load_state_dict`` move on, whether or not
        the values are others. Weights that are other tensors by now (FSDP gathers them anew) are not compared, unless
        ``load_state_dict(assign=True)`` has put them there.
        """
        layer = next(iter(identity.memories.values()))
        weights, loads = tuple(layer._parameters.values()), layer.loads
        versions = _versions(weights)
        if self.weights is not None:
            before, versions_before, loads_before = self.weights
            others = any(map(operator.is_not, before, weights))
            if loads != loads_before or (not others and versions != versions_before):
                raise StateError(
                    "past_key_values: the adapter's weights were changed (by a training step, load_state_dict) after "
                    "this cache's keys and values were computed; start with an empty cache"
                )
        self.weights = weights, versions, loads


def _versions(weights: Iterable[torch.Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(torch.Tensor._version.__get__, weights))
    except RuntimeError:  # made in inference mode: nothing counts their changes
        return ()


def is_outdated(cache: Cache) -> bool:
    """Whether the adapter was changed since ``cache`` was fed; its keys and values are to be computed anew."""
    fed = getattr(cache, _FED, None)
    if fed is None or fed.weights is None:
        return False
    weights, versions, loads = fed.weights
    return _versions(weights) != versions or next(iter(fed.identity.memories.values())).loads != loads


def _refuse_crop(*args, **kwargs) -> None:
    raise UnsupportedError(
        "crop: a cache of a patched model cannot be cropped, because the memory has already written the tokens "
        "that would go; keep a copy (copy.deepcopy(cache), memory.clone()) from before them instead"
    )


class MemoryLayerMixin:
    """Adds the memory of one layer to a cache layer.

    ``memory`` is the cache's MemoryState, or None while the caller's own memory is used with this cache.
    """

    memory: MemoryState | None = None
    memory_layer_idx: int = 0
    # A written state cannot be taken back: `generate` must not run ahead and crop.
    is_croppable = False

    def _move_memory(self, change) -> None:
        if self.memory is not None:
            self.memory.move_rows(self.memory_layer_idx, change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keys, values and memory follow the beams; the memory keeps its address."""
        super().reorder_cache(beam_idx)
        self._move_memory(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times in a row."""
        super().batch_repeat_interleave(repeats)
        self._move_memory(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows ``indices``."""
        super().batch_select_indices(indices)
        self._move_memory(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Empty the layer and forget its memory, in place."""
        super().reset()
        if self.memory is not None:
            self.memory.start_over()
        self._move_memory(torch.zeros_like)

    def crop(self, *args, **kwargs) -> None:
        """Raises: what the memory has written cannot be taken back."""
        _refuse_crop()


ROOM = 64  # tokens
# What MemoryDynamicLayer goes past on a CPU; None: somebody had replaced it already.
_UPDATE = DynamicLayer.update if DynamicLayer.update.__globals__ is vars(cache_utils) else None


class _Room:
    """Keys and values that have room for more tokens, [B, heads, length, D] each, and views of what is written.

    Several layers may come to share one (copies of a layer, one that was set back to an earlier length): what one has
    written, no other overwrites.
    """

    def __init__(self, old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]):
        self._whole = tuple(map(_longer, old, new))
        self._claims: dict[int, object] = {}
        self._see(old[0].shape[2] + new[0].shape[2])

    def _see(self, filled: int) -> None:
        self._filled = filled
        # .data: what is written behind a view later does not count as a change of it, for autograd.
        self.views = tuple(whole.data.narrow(2, 0, filled) for whole in self._whole)

    def append(self, old: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Write keys and values behind the ``old`` ones; False if those are not all that is here, or there is no room.

        Threads may call it at once: one of them gets the place.
        """
        views, at, count = self.views, self._filled, new[0].shape[2]
        if old[0] is not views[0] or old[1] is not views[1] or not writable(self._whole[0]):
            return False
        for mine, before, after in zip(self._whole, old, new):
            batch, heads, room, dim = mine.shape
            # Address and shape: a view that was given other data is no view of this any more.
            if before.data_ptr() != mine.data_ptr() or before.shape != (batch, heads, at, dim):
                return False
            if at + count > room or after.dtype != mine.dtype or after.shape != (batch, heads, count, dim):
                return False
        claim = object()
        if self._claims.setdefault(at, claim) is not claim:
            return False
        for mine, after in zip(self._whole, new):
            mine.narrow(2, at, count).copy_(after)
        self._see(at + count)
        return True


class MemoryDynamicLayer(MemoryLayerMixin, DynamicLayer):
    """DynamicLayer with a memory.

    On a CPU, and where nothing is differentiated, keys and values grow inside tensors that have room for more: the
    plain layer copies all of them for each token. ``keys`` and ``values`` are what has been written, as ever, but need
    not be contiguous.
    """

    _room: _Room | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [B, heads, T, D] of new tokens; returns those of all tokens."""
        if (
            torch.compiler.is_compiling()
            or key_states.device.type != "cpu"
            or torch.is_grad_enabled()
            or DynamicLayer.update is not _UPDATE
            or not self.is_initialized
            or not self.keys.numel()
            or self.keys.dtype != key_states.dtype
            or self.values.dtype != value_states.dtype
        ):
            if self._room is not None:
                self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        old, new = (self.keys, self.values), (key_states, value_states)
        room = self._room
        if room is None or not room.append(old, new):
            room = self._room = _Room(old, new)
        self.keys, self.values = room.views
        return self.keys, self.values

    def _move_memory(self, change) -> None:
        self._room = None  # every move has replaced the keys and values, too
        super()._move_memory(change)

    def __getstate__(self) -> dict:
        """What is pickled or copied deeply: keys and values without the room."""
        found = self.__dict__ | {"_room": None}
        if self._room is not None:
            found |= {name: found[name].contiguous() for name in ("keys", "values")}
        return found

    def __copy__(self) -> MemoryDynamicLayer:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made


def _longer(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Tokens [B, heads, T, D], then new ones, then room."""
    length = old.shape[2] + new.shape[2]
    made = new.new_empty(*new.shape[:2], length + ROOM, new.shape[3])
    torch.cat([old, new], 2, out=made.narrow(2, 0, length))
    made.narrow(2, length, ROOM).zero_()  # torch.save of a view writes its whole storage
    return made


class MemoryDynamicSlidingWindowLayer(MemoryLayerMixin, DynamicSlidingWindowLayer):
    """DynamicSlidingWindowLayer with a memory; the memory keeps what has left the window."""


class CountingMixin:
    """Counts a static layer's tokens on the host as well: the layer's own count lies on its device."""

    counted: int = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values [B, heads, T, D] of new tokens."""
        if not torch.compiler.is_compiling():  # compiled forwards are not counted at the other end, either
            self.counted += key_states.shape[2]
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """Empty the layer and forget its memory, in place."""
        super().reset()
        self.counted = 0


class MemoryStaticLayer(CountingMixin, MemoryLayerMixin, StaticLayer):
    """StaticLayer with a memory."""


class MemoryStaticSlidingWindowLayer(CountingMixin, MemoryLayerMixin, StaticSlidingWindowLayer):
    """StaticSlidingWindowLayer with a memory; the memory keeps what has left the window."""


_WITH_MEMORY = {
    DynamicLayer: MemoryDynamicLayer,
    DynamicSlidingWindowLayer: MemoryDynamicSlidingWindowLayer,
    StaticLayer: MemoryStaticLayer,
    StaticSlidingWindowLayer: MemoryStaticSlidingWindowLayer,
}

# The attributes of a layer that nothing has been written to.
_FRESH = {
    DynamicLayer: tuple(vars(DynamicLayer())),
    DynamicSlidingWindowLayer: tuple(vars(DynamicSlidingWindowLayer(sliding_window=1))),
    StaticLayer: tuple(vars(StaticLayer(max_cache_len=1))),
    StaticSlidingWindowLayer: tuple(vars(StaticSlidingWindowLayer(max_cache_len=1, sliding_window=1))),
}


def memory_state(cache: Cache) -> MemoryState:
    """The live memory of a cache that a patched model has used.

    Raises:
        ValueError: the cache holds no memory (not used yet, or used with a ``memory=`` of the caller's).
    """
    memory = getattr(cache, _ATTRIBUTE, None)
    if memory is None:
        raise ArgumentError(
            f"cache: this {type(cache).__name__} holds no memory; it does once a patched model has run with it and "
            "without memory="
        )
    return memory


def adopt(cache: Cache, identity, memory: MemoryState | None, batch_size: int) -> MemoryState:
    """Make ``cache`` ready for a forward of ``batch_size`` rows and return the memory that it reads and writes.

    Empty plain layers are replaced by ours. With a caller's ``memory`` the cache gets no state of its own.

    Raises:
        TypeError: a kind of layer that cannot carry a memory.
        ValueError: the cache holds tokens that its memory never read, or another batch size.
    """
    own = getattr(cache, _ATTRIBUTE, None)
    external = memory is not None and memory is not own
    if not external and own is not None and own.batch_size == batch_size:
        identity.check(own.identity)
        return own  # every forward but a conversation's first
    if external:
        check_rows(memory, batch_size)
        if own is not None and all(_is_empty(cache.layers[layer_idx]) for layer_idx in own):
            setattr(cache, _ATTRIBUTE, None)  # reset: it may start anew with the caller's
            for layer_idx in own:
                cache.layers[layer_idx].memory = None
        elif own is not None:
            raise ArgumentError(
                "memory: this cache already carries a memory of its own; pass memory_state(cache) or a fresh cache"
            )
        replace_layers(cache, identity)
        return memory
    specs = identity.layer_specs()
    replace_layers(cache, identity)
    if own is None:
        if not all(_is_empty(cache.layers[layer_idx]) for layer_idx in specs):
            raise ArgumentError(
                "past_key_values: this cache was filled with a memory= of the caller's; pass that memory again, or "
                "start a new cache"
            )
        own = MemoryState({}, identity=identity)
        setattr(cache, _ATTRIBUTE, own)
    for layer_idx, spec in specs.items():
        layer = cache.layers[layer_idx]
        if layer_idx in own and not _is_empty(layer):
            rows = own[layer_idx].shape[0]
            raise ArgumentError(f"input_ids: got a batch of {batch_size}, but the cache's memory has {rows} row(s)")
        layer.memory, layer.memory_layer_idx = own, layer_idx
        own.start(layer_idx, spec, batch_size)
    return own


def expect(cache: Cache, identity) -> tuple[Fed, int | None]:
    """Check that a forward may go on with what ``cache`` holds → what is known of it, and how many tokens it holds.

    The number is None where it is not counted (compiled forwards).

    Raises:
        ValueError: keys and values of another adapter, tokens that the memory never read, or a forward that an error
            has cut short; a cache that is empty again is as good as new.
    """
    fed, held = getattr(cache, _FED, None), None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        layer = cache.layers[next(iter(identity.memories))]
        held = layer.counted if isinstance(layer, CountingMixin) else layer.get_seq_length()
        if not held and fed is not None:
            held = int(layer.get_seq_length())  # compiled forwards are not counted; else it was reset
            if held:
                layer.counted = held
    if fed is None or held == 0:
        fed = Fed(identity)
        setattr(cache, _FED, fed)
    elif fed.broken:
        raise StateError(fed.broken)
    elif fed.identity is not identity:
        _check_same(fed, identity)
        if not compiling:
            fed.identity, fed.weights = identity, None
    if compiling:
        return fed, None
    fed.check_weights(identity)
    if fed.tokens is not None and held != fed.tokens:
        _check_count(cache, fed, held)
    return fed, held


def _check_count(cache: Cache, fed: Fed, held: int) -> None:
    """Raise unless the memory of a cache has read what it holds; a caller's may have read more."""
    if held > fed.tokens:
        raise StateError(
            f"past_key_values: this cache holds {held} tokens, of which its memory has read {fed.tokens} (the model "
            "was not patched, or another one used it); start with an empty cache"
        )
    if getattr(cache, _ATTRIBUTE, None) is not None:
        raise StateError(
            f"past_key_values: this cache holds {held} tokens, but its memory has read {fed.tokens}: its keys and "
            "values were cut, and what the memory has written cannot be taken back; keep a copy from before "
            "(copy.deepcopy(cache)) instead"
        )


def _check_same(fed: Fed, identity) -> None:
    try:
        identity.check(fed.identity)
    except ValueError as error:
        raise ArgumentError(
            f"past_key_values: its keys and values were computed under another adapter or backbone ({error}); start "
            "with an empty cache"
        ) from None


def why_no_cache(decoder, layer_indices: Iterable[int]) -> str:
    """Why the cache that a decoder uses cannot carry the memory of its layers, or ""."""
    module = sys.modules[type(decoder).__module__]
    for found in vars(module).values():
        if isinstance(found, type) and issubclass(found, Cache) and found.__module__ == module.__name__:
            return f"uses a cache of its own, {found.__name__}, which carries no memory"
    try:
        cache = DynamicCache(config=decoder.config)
    except Exception:  # a configuration that it cannot be made of: the first forward shows
        return ""
    layers = cache.layers
    for layer_idx in layer_indices:
        if layer_idx >= len(layers) and cache.layer_class_to_replicate is None:
            return f"keeps no keys and values of layer {layer_idx} in its cache, which so carries no memory of it"
        if layer_idx < len(layers) and type(layers[layer_idx]) not in _WITH_MEMORY:
            return f"keeps layer {layer_idx} in a {type(layers[layer_idx]).__name__}, which carries no memory"
    return ""


def mark_missed(cache) -> None:
    """Note that ``cache`` gets tokens which its memory does not read (the memory is disabled)."""
    fed = getattr(cache, _FED, None)
    if fed is not None:
        fed.broken = (
            "past_key_values: this cache got tokens while the memory was disabled, which its memory has not read; "
            "start with an empty cache"
        )


def cut_short(cache, error: BaseException) -> None:
    """Note that something failed after ``cache`` and its memory had got its tokens."""
    fed = getattr(cache, _FED, None)
    if fed is not None:
        fed.cut_short(error)
    memory = getattr(cache, _ATTRIBUTE, None)
    if memory is not None:
        memory.interrupt(error)


def rewound(cache) -> None:
    """Note that ``cache`` was taken back to an earlier length, in all layers; a forward that failed is undone."""
    fed = getattr(cache, _FED, None)
    if fed is not None:
        fed.broken, fed.tokens = "", None


def check_rows(memory: MemoryState, batch_size: int) -> None:
    """Raise ValueError unless ``memory`` has ``batch_size`` rows."""
    if memory.batch_size != batch_size:
        raise ArgumentError(
            f"memory: got {memory.batch_size} row(s) for a batch of {batch_size}; see MemoryState.select and repeat"
        )


def replace_layers(cache: Cache, identity) -> None:
    """Turn the plain layers that a memory belongs to into ours; only empty ones can be."""
    if "crop" not in vars(cache) and not torch.compiler.is_compiling():
        # The cache's own goes layer by layer, and would have cut those without a memory before one with it raises.
        cache.crop = _refuse_crop
    for layer_idx in identity.layer_specs():
        # A cache made without a configuration grows its layers at the first update.
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[layer_idx]
        if isinstance(layer, MemoryLayerMixin):
            continue
        kind = _WITH_MEMORY.get(type(layer))
        if kind is None:
            allowed = ", ".join(plain.__name__ for plain in _WITH_MEMORY)
            raise ArgumentTypeError(
                f"past_key_values: layer {layer_idx} is a {type(layer).__name__}, allowed {allowed}"
            )
        if not _is_empty(layer):
            raise ArgumentError(
                f"past_key_values: layer {layer_idx} already holds tokens that the memory has not read (the model "
                "was not patched, its memory was disabled, or PEFT's prefix tuning has put its prefix there, which is "
                "not supported); start with an empty cache"
            )
        ours = kind.__new__(kind)
        # torch 2.11's compiler cannot list the attributes of an object; those of a new layer are known.
        names = _FRESH[type(layer)] if torch.compiler.is_compiling() and not layer.is_initialized else vars(layer)
        for name in names:
            setattr(ours, name, getattr(layer, name))
        cache.layers[layer_idx] = ours


def _is_empty(layer) -> bool:
    return not layer.is_initialized or int(layer.get_seq_length()) == 0

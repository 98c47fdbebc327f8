"""A key/value cache for decoding many rows that part from each other and end at different times.

transformers' dynamic layer concatenates the whole cache at every token and copies it again to drop a row; on a CPU
that costs as much as the matrix products. Here storage grows in steps, tokens are written in place, a row that ends is
overwritten by the last active one, and a row that parts from another is copied behind the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

_GROWTH = 32  # slots added at a time


class RowLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer: storage (rows, heads, slots, head_dim), of which a part is used."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.store: tuple[Tensor, Tensor] | None = None
        self.rows = 0
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.rows = key_states.shape[0]
        self.store = (_slots(key_states, self.rows, _GROWTH), _slots(value_states, self.rows, _GROWTH))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self._reserve(self.rows, end, self.rows)
        for store, new in zip(self._stores(), (key_states, value_states), strict=True):
            store[: self.rows, :, self.length : end] = new
        self.length = end
        return self.entries()

    def entries(self, start: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values from slot `start` on."""
        keys, values = self._stores()
        used = (slice(self.rows), slice(None), slice(start, self.length))
        return keys[used], values[used]

    def fill(self, keys: Tensor, values: Tensor, rows: Tensor, columns: slice, shape: tuple[int, int]) -> None:
        """Write prefilled entries into some rows and columns of a cache of `shape` (rows, slots)."""
        if self.store is None:
            self.rows, self.length = shape
            self.store = (_slots(keys, shape[0], shape[1] + _GROWTH), _slots(values, shape[0], shape[1] + _GROWTH))
            self.is_initialized = True
        for store, new in zip(self._stores(), (keys, values), strict=True):
            store[rows, :, columns] = new

    def move_rows(self, source: Tensor, target: Tensor, rows: int, most: int) -> None:
        """Copy rows `source` over rows `target`, then keep the first `rows`; there will never be more than `most`."""
        self._reserve(rows, self.length, most)
        for store in self._stores():
            store[target, :, : self.length] = store[source, :, : self.length]
        self.rows = rows

    def reorder_cache(self, beam_idx: Tensor) -> None:
        keys, values = self._stores()
        self.store, self.rows = (keys[beam_idx], values[beam_idx]), len(beam_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _stores(self) -> tuple[Tensor, Tensor]:
        assert self.store is not None
        return self.store

    def _reserve(self, rows: int, slots: int, most: int) -> None:
        keys, values = self._stores()
        if rows > keys.shape[0] or slots > keys.shape[2]:
            shape = (
                min(rows + rows // 2, most) if rows > keys.shape[0] else self.rows,
                slots + _GROWTH if slots > keys.shape[2] else keys.shape[2],
            )
            self.store = (_grow(keys, self.rows, self.length, shape), _grow(values, self.rows, self.length, shape))


def _slots(like: Tensor, rows: int, slots: int) -> Tensor:
    # Zeros, not empty memory: masked slots are multiplied by attention weight 0, and 0 * NaN is NaN.
    return like.new_zeros(rows, like.shape[1], slots, like.shape[3])


def _grow(store: Tensor, rows: int, length: int, shape: tuple[int, int]) -> Tensor:
    grown = _slots(store, *shape)
    grown[:rows, :, :length] = store[:rows, :, :length]
    return grown


def row_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache of `RowLayer`s, or transformers' own where some layer is not plain full attention."""
    cache = DynamicCache(config=config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [RowLayer() for _ in cache.layers]  # type: ignore[assignment]
        cache.layer_class_to_replicate = None
    return cache


def row_layers(cache: DynamicCache) -> list[RowLayer]:
    """The layers of a cache of `RowLayer`s; none of any other cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, RowLayer)]
    return layers if len(layers) == len(cache.layers) else []


def is_row_cache(cache: DynamicCache) -> bool:
    return bool(row_layers(cache))


def reorder(cache: DynamicCache, order: Tensor) -> None:
    """Make row i of any cache what row order[i] was."""
    # Unlike batch_select_indices, every kind of layer has it; declared for LongTensor, which no function returns.
    cache.reorder_cache(order)  # type: ignore[arg-type]


def has_recurrent_layers(cache: DynamicCache) -> bool:
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def drop_rows(cache: DynamicCache, finished: Tensor) -> Tensor:
    """Remove finished rows (B,); returns the old indices of the remaining rows in their new order."""
    order = torch.arange(len(finished), device=finished.device)
    remaining = int((~finished).sum())
    holes = finished[:remaining].nonzero().squeeze(-1)
    movers = (~finished[remaining:]).nonzero().squeeze(-1) + remaining
    order[holes] = movers
    order = order[:remaining]
    if layers := row_layers(cache):
        for layer in layers:
            layer.move_rows(movers, holes, remaining, remaining)
    else:
        reorder(cache, order)
    return order


def copy_rows(cache: DynamicCache, source: Tensor, rows: int, most: int) -> None:
    """Append copies of rows `source` to a cache of `rows` rows, which will never have more than `most`."""
    if not len(source):
        return
    new = torch.arange(rows, rows + len(source), device=source.device)
    if layers := row_layers(cache):
        for layer in layers:
            layer.move_rows(source, new, rows + len(source), most)
    else:
        everyone = torch.arange(rows, device=source.device)
        reorder(cache, torch.cat([everyone, source]))

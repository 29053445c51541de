"""Run a block on some tokens of each sequence, so that the others cost nothing.

The chosen tokens are put together, and with them whatever comes with the hidden states for each token: rotary tables,
position ids, rows and columns of masks and of position biases. They attend to each other alone. Sequences with fewer
chosen tokens than the longest are filled up with tokens that nobody attends to, and whose output is dropped.

A cache keeps its length: of a token that passes the block by it holds keys that are not a number. That is how later
tokens know that it is not there, also after the rows of a cache were reordered, repeated or cropped.

Shapes: B sequences, T tokens, D features, R sequences with chosen tokens, K of these at most, H heads, L keys.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.conditional.block_calls import MASKS, Called, is_cache, without_caches
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.discovery.probe import difference, tolerance

__all__ = ["OnChosen", "Places", "check_on_chosen", "places_of"]


@dataclass(frozen=True)
class Places:
    """Which tokens are put together: rows_R of the batch, places_RK in them, and whether they were chosen."""

    rows_R: Tensor
    places_RK: Tensor
    is_real_RK: Tensor
    num_tokens: int

    @property
    def flat_N(self) -> Tensor:
        """Return the positions of the chosen ones among all tokens of the batch."""
        return (self.rows_R[:, None] * self.num_tokens + self.places_RK)[self.is_real_RK]


def places_of(chosen_BT: Tensor, *, at_least_one: bool = False) -> Places:
    """Return the places of chosen tokens, in their order; if none is, one that is not real if there must be one."""
    counts_B = chosen_BT.sum(1)
    rows_R = counts_B.nonzero()[:, 0]
    if at_least_one and len(rows_R) == 0:
        rows_R = rows_R.new_zeros(1)
    num = max(1, int(counts_B.max())) if len(rows_R) else 0
    places_RK = (~chosen_BT[rows_R]).int().argsort(dim=1, stable=True)[:, :num]
    return Places(rows_R, places_RK, chosen_BT[rows_R].gather(1, places_RK), chosen_BT.shape[1])


class OnChosen:
    """Calls a block's forward for some tokens.

    Args:
        module: the block.
        is_causal: whether its tokens attend to earlier ones alone.

    Raises:
        ValueError: if it takes no attention mask.
    """

    def __init__(self, module: nn.Module, *, is_causal: bool) -> None:
        self.forward: Callable[..., Any] = module.forward
        self.is_causal = is_causal
        numbers = (getattr(part, "layer_idx", None) for part in module.modules())
        self.layer_idx = next((number for number in numbers if isinstance(number, int)), 0)
        self.num_outputs: int | None = None  # beside the hidden states; None where these come alone
        takes = inspect.signature(module.forward).parameters
        self.mask_name = next((name for name in MASKS if name in takes), "")
        if not self.mask_name:
            raise ValueError(f"{type(module).__name__} takes no attention mask, so that it cannot run on some tokens")

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], chosen_BT: Tensor
    ) -> tuple[Tensor, Places, object]:
        """Run the block on the chosen tokens.

        Args:
            args: what the block was called with, as `kwargs`.
            kwargs: see there.
            chosen_BT: bool.

        Returns:
            what it gives for the chosen tokens, (N, D) in their order; their places; and all it gives, with arguments
            that it passes on whole.
        """
        bound = inspect.signature(self.forward).bind(*args, **kwargs)
        cache = next((v for v in _values(bound.arguments) if is_cache(v)), None)
        places = places_of(chosen_BT, at_least_one=cache is None or cache.get_seq_length(self.layer_idx) == 0)
        x_BTD = next(v for v in _values(bound.arguments) if isinstance(v, Tensor) and v.ndim == 3)
        if len(places.rows_R) == 0:
            assert cache is not None
            _Gaps(cache, places, chosen_BT).skip(self.layer_idx)
            nothing = x_BTD if self.num_outputs is None else (x_BTD, *(None,) * self.num_outputs)
            return x_BTD.new_zeros(0, x_BTD.shape[-1]), places, nothing
        gaps = None if cache is None else _Gaps(cache, places, chosen_BT)
        mask = self._mask(bound.arguments.get(self.mask_name), x_BTD, places, gaps)
        gathered: dict[int, tuple[Tensor, Tensor]] = {}
        for name, value in bound.arguments.items():
            if name != self.mask_name:
                bound.arguments[name] = _gather(value, places, len(chosen_BT), gaps, gathered)
        bound.arguments[self.mask_name] = mask
        output = self.forward(*bound.args, **bound.kwargs)
        given_RKD = first_tensor(output)
        self.num_outputs = len(output) - 1 if isinstance(output, tuple) else None
        if isinstance(output, tuple):
            output = tuple(gathered[id(v)][0] if id(v) in gathered else v for v in output)
        return given_RKD[places.is_real_RK], places, output

    def _mask(self, mask: Tensor | None, x_BTD: Tensor, places: Places, gaps: "_Gaps | None") -> Tensor | None:
        """Return who of the chosen attends to whom, (R, 1 or heads, K, K or L), bool or added; None for the usual."""
        past = 0 if gaps is None else gaps.num_past(self.layer_idx)
        if mask is None and past == 0 and (self.is_causal or bool(places.is_real_RK.all())):
            return None  # fillers come last, so that nobody before them attends to them
        if mask is None:
            num = x_BTD.shape[1]
            keys_L = torch.arange(past + num, device=x_BTD.device)
            queries_T1 = past + torch.arange(num, device=x_BTD.device)[:, None]
            is_open = keys_L <= queries_T1 if self.is_causal else torch.ones_like(keys_L <= queries_T1)
            mask = torch.zeros(is_open.shape, dtype=x_BTD.dtype, device=x_BTD.device)
            mask = mask.masked_fill(~is_open, torch.finfo(mask.dtype).min)[None, None]
        elif mask.ndim != 4:
            raise ValueError(
                "a block that runs on some tokens needs masks of (batch, heads, queries, keys), got "
                f"{tuple(mask.shape)}; load the model with attn_implementation='sdpa' or 'eager'"
            )
        rows_R = places.rows_R if len(mask) > 1 else torch.zeros_like(places.rows_R)
        if mask.shape[2] > 1 or places.num_tokens == 1:
            mask_RHKL = mask[rows_R[:, None], :, places.places_RK].transpose(1, 2)
        else:
            mask_RHKL = mask[rows_R].expand(-1, -1, places.places_RK.shape[1], -1)
        if past == 0:
            columns = places.places_RK[:, None, None, :].expand(*mask_RHKL.shape[:3], -1)
            mask_RHKL, is_there = mask_RHKL.gather(3, columns), places.is_real_RK
        else:
            assert gaps is not None
            is_there = gaps.is_there(self.layer_idx)
        closed = False if mask_RHKL.dtype == torch.bool else torch.finfo(mask_RHKL.dtype).min
        mask_RHKL = mask_RHKL.masked_fill(~is_there[:, None, None, :], closed)
        opened = mask_RHKL.dtype == torch.bool  # True, or 0 to add: fillers attend to all
        return mask_RHKL.masked_fill(~places.is_real_RK[:, None, :, None], opened)


class _Gaps:
    """Stands in a block for a cache that also holds the tokens which pass the block by.

    Args:
        cache: of Transformers, growing and with all keys in one tensor per layer.
        places: of the tokens that do not pass by.
        chosen_BT: the same as flags.
    """

    def __init__(self, cache: Any, places: Places, chosen_BT: Tensor) -> None:
        self.cache, self.places, self.chosen_BT = cache, places, chosen_BT

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def num_past(self, layer_idx: int) -> int:
        """Return how many tokens the layer holds."""
        return int(self.cache.get_seq_length(layer_idx))

    def _past_keys(self, layer_idx: int) -> Tensor:
        """Return keys_BHLD that the layer holds.

        Raises:
            ValueError: if the cache has a length of its own, or keeps only the last tokens.
        """
        keys: Tensor | None = getattr(self.cache.layers[layer_idx], "keys", None)
        if keys is None or keys.shape[-2] != self.num_past(layer_idx):
            raise ValueError(
                "blocks that tokens pass by need a cache that grows and forgets nothing; pass "
                "past_key_values=DynamicCache(), or use_cache=False"
            )
        return keys

    def is_there(self, layer_idx: int) -> Tensor:
        """Return which keys tokens can attend to once the present ones are in it, bool (R, L)."""
        past_BL = ~self._past_keys(layer_idx)[:, 0, :, 0].isnan()
        return torch.cat((past_BL, self.chosen_BT), dim=1)[self.places.rows_R]

    def skip(self, layer_idx: int) -> None:
        """Let all present tokens pass by."""
        keys = self._past_keys(layer_idx)
        nothing = keys.new_full((*keys.shape[:2], self.places.num_tokens, keys.shape[3]), torch.nan)
        values = self.cache.layers[layer_idx].values
        self.cache.update(
            nothing, torch.zeros_like(nothing)[..., :1].expand(*nothing.shape[:3], values.shape[3]), layer_idx
        )

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values of the chosen tokens in, and return what they attend to."""
        is_first = self.num_past(layer_idx) == 0
        both = []
        for tensor, filler in ((keys, torch.nan), (values, 0.0)):
            whole_BTHD = tensor.new_full((*self.chosen_BT.shape, tensor.shape[1], tensor.shape[3]), filler).flatten(
                0, 1
            )
            rows_NHD = tensor.transpose(1, 2)[self.places.is_real_RK]
            whole_BTHD = whole_BTHD.index_copy(0, self.places.flat_N, rows_NHD)
            both.append(whole_BTHD.unflatten(0, self.chosen_BT.shape).transpose(1, 2))
        all_keys, all_values = self.cache.update(*both, layer_idx, *args, **kwargs)
        if is_first:
            return keys, values
        rows_R = self.places.rows_R
        return all_keys[rows_R].nan_to_num(nan=0.0), all_values[rows_R]


def _values(arguments: Mapping[str, Any]) -> list[Any]:
    """Return arguments by name, those of a catch-all among them."""
    found: list[Any] = []
    for value in arguments.values():
        found.extend(value.values() if isinstance(value, dict) else [value])
    return found


def _gather(
    value: Any, places: Places, num_rows: int, gaps: _Gaps | None, gathered: dict[int, tuple[Tensor, Tensor]]
) -> Any:
    """Return an argument for the chosen tokens: tensors with one entry per token, also inside tuples and mappings."""
    if is_cache(value):
        return gaps
    if isinstance(value, dict):
        return {name: _gather(part, places, num_rows, gaps, gathered) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_gather(part, places, num_rows, gaps, gathered) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) not in (1, num_rows):
        return value
    num = places.num_tokens
    rows_R1 = (places.rows_R if len(value) > 1 else torch.zeros_like(places.rows_R))[:, None]
    if value.ndim < 4:
        if value.shape[1] != num:
            return value
        chosen = value[rows_R1, places.places_RK]
    else:
        if value.shape[2] != num:
            return value
        chosen = value[rows_R1, :, places.places_RK].transpose(1, 2)
        if value.shape[3] == num:
            columns = places.places_RK[:, None, None, :].expand(*chosen.shape[:3], -1)
            chosen = chosen.gather(3, columns)
    gathered[id(chosen)] = (value, chosen)  # the second is held so that its identity stays its own
    return chosen


@torch.no_grad()
def check_on_chosen(run: OnChosen, call: Called, name: str) -> None:
    """Check that a block gives chosen tokens what it gives them where the others are masked.

    Raises:
        ValueError: if it does not: it counts positions by itself, or mixes tokens in other ways than by attention.
    """
    bound = without_caches(call)
    num_rows, num = call.read.shape[:2]
    chosen_BT = torch.arange(num, device=call.read.device).add(torch.arange(num_rows, device=call.read.device)[:, None])
    chosen_BT = chosen_BT % 2 == 1 if num % 2 == 0 else chosen_BT % num > 1
    found_ND, places, _ = run(bound.args, bound.kwargs, chosen_BT)
    mask = bound.arguments.get(run.mask_name)
    is_open = torch.ones(num, num, dtype=torch.bool, device=call.read.device)
    is_open = is_open.tril() if run.is_causal else is_open
    if mask is None:
        mask = torch.zeros(num, num, dtype=call.read.dtype, device=call.read.device)[None, None]
        mask = mask.masked_fill(~is_open, torch.finfo(mask.dtype).min)
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    is_alone = torch.eye(num, dtype=torch.bool, device=call.read.device)
    is_hidden = ~chosen_BT[:, None, None, :] & ~is_alone
    bound.arguments[run.mask_name] = mask.expand(num_rows, -1, num, num).masked_fill(is_hidden, closed)
    expected_BTD = first_tensor(run.forward(*bound.args, **bound.kwargs))
    expected_ND = expected_BTD.flatten(0, 1)[places.flat_N]
    if not difference(found_ND, expected_ND) <= tolerance(expected_ND):
        raise ValueError(
            f"{name} ({type(call.module).__name__}) cannot run on some tokens: their positions do not come with them, "
            "or tokens meet elsewhere than in attention; leave such blocks out with `layers`"
        )

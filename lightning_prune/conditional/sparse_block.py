"""Run a block for some of its tokens only, with the keys and values of all of them.

What a block does besides attention it does token by token, and attention meets the other tokens in one place: where
keys and values go into the cache. So a block runs twice, neither time whole. With a stand-in for the cache the first
run, over all tokens, ends once keys and values are known; what only leads to queries is not computed in it. The second,
over the tokens that run, takes what the first has computed and gets the keys and values of all. Nothing is known of
an attention class but that it hands its keys and values to `update` of a cache.

What only leads to queries, or only to keys and values, is found by putting noise in its place and looking where it
comes out.

Limits: a fused projection computes the queries of all tokens too. Without a cache in the block's signature (encoders),
    or with a state in place of keys and values (Mamba), every token is computed and the result mixed, as while
    training; so it is under torch.compile, with kernels that take no mask of pairs, and wherever the first trial shows
    another result. Of a call in which fewer than 16 tokens skip and any runs, as when a small batch decodes, all are
    computed, since reading the weights is then what costs.

Shapes: B sequences, T tokens of the call, D channels; R sequences with tokens that run, K of these tokens at most, S
keys.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.conditional.stand_in import StandIn, forwards, with_hidden
from lightning_prune.structured.depth.bypass import first_tensor

__all__ = ["SparseBlock", "mixed", "pattern"]

_CACHES = ("past_key_values", "past_key_value", "layer_past")
_MASK = "attention_mask"
_LEAST = 16  # tokens that skip, for which running twice pays; weights are read all the same for those that run


class _KnownError(Exception):
    """Ends the first run: the keys and values are known."""


class _Keys:
    """Stands in for the cache of one block.

    Args:
        cache: the model's; None if it has none.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.full: tuple[Tensor, Tensor] | None = None
        self.rows: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of all tokens and end the run; in the second run give those of all."""
        if self.full is not None:
            if self.rows is None:
                return self.full
            return self.full[0][self.rows], self.full[1][self.rows]
        if self.cache is None:
            self.full = keys, values
        else:
            self.full = self.cache.update(keys, values, layer, *args, **kwargs)
        raise _KnownError

    def get_seq_length(self, layer: int = 0) -> int:
        """Return how many tokens the cache holds."""
        return 0 if self.cache is None else self.cache.get_seq_length(layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def mixed(runs_BT: Tensor, before_BTD: Tensor, after_BTD: Tensor) -> Tensor:
    """Return the stream behind a block for tokens that run, in front of it for the others; gates have a gradient."""
    gate_BT1 = runs_BT[..., None].to(after_BTD.dtype)
    return (1 - gate_BT1) * before_BTD + gate_BT1 * after_BTD


def pattern(like_BTD: Tensor, number: int) -> Tensor:
    """Return which tokens run in a trial, bool (B, T): another share in every sequence, none in some."""
    shape = like_BTD.shape[:2]
    index_BT = torch.arange(shape.numel(), device=like_BTD.device).view(shape)
    return (index_BT * (number + 2) + number) % 3 == 0


class SparseBlock:
    """Runs one block sparsely where it can.

    Args:
        part: stands in the block.
    """

    def __init__(self, part: StandIn) -> None:
        self.part = part
        self.is_sparse = False  # until a trial has shown that it gives the same
        self.trial: int | None = None  # a number in the place of what decides, to try it
        self.is_prepared = True
        self.least = _LEAST
        self.query_only: tuple[str, ...] = ()
        self.keys_only: tuple[str, ...] = ()
        self.shared: tuple[str, ...] = ()

    def __call__(self, runs_BT: Tensor | None, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
        """Return what the block gives, the stream of tokens that do not run being unchanged.

        Args:
            runs_BT: bool; None if all run.
            args: of the block.
            kwargs: of the block.
        """
        if not self.is_prepared:
            return self._prepare(args, kwargs)
        if runs_BT is None and self.trial is None:
            return self.part.compute(*args, **kwargs)
        arguments = self.part.named(args, kwargs)
        before_BTD = next(iter(arguments.values()))
        if self.trial is not None:
            runs_BT = pattern(before_BTD, self.trial)
        assert runs_BT is not None
        if self.is_sparse and not torch.compiler.is_compiling() and _takes_pairs(arguments):
            num_running = int(runs_BT.sum())
            if num_running == runs_BT.numel():
                return self.part.compute(*args, **kwargs)
            if num_running == 0 or runs_BT.numel() - num_running >= self.least:
                return self._run_sparsely(runs_BT, num_running, arguments)
        output = self.part.compute(*args, **kwargs)
        return with_hidden(output, torch.where(runs_BT[..., None], first_tensor(output), before_BTD))

    def _run_sparsely(self, runs_BT: Tensor, num_running: int, arguments: dict[str, Any]) -> Any:
        stream = next(iter(arguments))
        before_BTD: Tensor = arguments[stream]
        keys, known = self._first_run(arguments, self.shared if num_running else ())
        if num_running == 0:
            return with_hidden(self.output, before_BTD)
        count_B = runs_BT.sum(1)
        rows_R = count_B.nonzero()[:, 0]
        most = int(count_B.max())
        places_RK = runs_BT[rows_R].to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, :most]
        keys.rows = None if len(rows_R) == len(runs_BT) else rows_R
        pick = _Pick(rows_R, places_RK, runs_BT.shape)
        chosen = {name: pick(value) for name, value in arguments.items() if name != _MASK}
        chosen[self.cache_name] = keys
        if _MASK in arguments:
            chosen[_MASK] = pick.mask(arguments[_MASK], keys)
        instead: dict[nn.Module, Any] = {self._module(name): _Giver([pick(value)]) for name, value in known.items()}
        instead |= {self._module(name): _Blank(self.widths[name]) for name in self.keys_only}
        with forwards(instead):
            after_RKD = first_tensor(self.part.compute(**chosen))
        is_real_RK = torch.arange(most, device=runs_BT.device) < count_B[rows_R, None]
        flat_N = (rows_R[:, None] * runs_BT.shape[1] + places_RK)[is_real_RK]
        stream_ND = before_BTD.flatten(0, 1).index_copy(0, flat_N, after_RKD[is_real_RK])
        return with_hidden(self.output, stream_ND.view_as(before_BTD))

    def _module(self, name: str) -> nn.Module:
        return self.part.block.get_submodule(name)

    def _first_run(self, arguments: Mapping[str, Any], shared: tuple[str, ...]) -> tuple[_Keys, dict[str, Tensor]]:
        """Return the keys and values of all tokens, and what else the second run need not compute."""
        keys = _Keys(arguments.get(self.cache_name))
        known: dict[str, Tensor] = {}
        handles = [self._module(name).register_forward_hook(_Taker(known, name)) for name in shared]
        instead = {self._module(name): _Blank(self.widths[name]) for name in self.query_only}
        try:
            with forwards(instead):
                self.part.compute(**{**arguments, self.cache_name: keys})
        except _KnownError:
            return keys, known
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"{type(self.part.block).__name__} no longer hands its keys and values to the cache")

    def _prepare(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
        """Find out in a call of the block how it can run sparsely, and return what it gives.

        `is_sparse` is then whether it hands its keys and values to a cache; that the result is the same is for others
        to try.
        """
        self.is_prepared = True
        arguments = self.part.named(args, kwargs)
        self.cache_name = next((name for name in _CACHES if name in self.part.names), _CACHES[0])
        self.query_only = self.keys_only = self.shared = ()
        self.widths: dict[str, int] = {}
        before = next(iter(arguments.values()))
        finished: dict[str, Tensor] = {}
        inner = [(name, module) for name, module in self.part.block.named_modules() if name]
        handles = [module.register_forward_hook(_Taker(finished, name)) for name, module in inner]
        try:
            self.part.compute(**{**arguments, self.cache_name: _Keys(None)})
        except _KnownError:
            self.is_sparse = True
        except Exception:  # noqa: BLE001 - a block that knows no such cache says so in its own way
            self.is_sparse = False
        finally:
            for handle in handles:
                handle.remove()
        if self.is_sparse:
            outermost = [n for n in finished if n and not any(n.startswith(f"{o}.") for o in finished)]
            fitting = [n for n in outermost if finished[n].ndim == 3 and finished[n].shape[:2] == before.shape[:2]]
            self.widths = {name: finished[name].shape[-1] for name in fitting}
            self.query_only = tuple(name for name in fitting if not self._reaches_keys(name, arguments))
            others = [name for name in fitting if name not in self.query_only]
            self.keys_only = tuple(name for name in others if not self._reaches_output(name, arguments))
            self.shared = tuple(name for name in others if name not in self.keys_only)
        output = self.part.compute(*args, **kwargs)
        self.output = with_hidden(output, None) if isinstance(output, tuple) else None
        return output

    def _reaches_output(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Return whether a block depends on the output of a module in another way than by its keys and values."""
        keys, _ = self._first_run(arguments, ())
        found = []
        for seed in (0, 1):
            with forwards({self._module(name): _Noise(self.widths[name], seed)}):
                found.append(first_tensor(self.part.compute(**{**arguments, self.cache_name: keys})))
        return not torch.equal(*found)

    def _reaches_keys(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Return whether keys or values depend on the output of a module."""
        found = []
        for seed in (0, 1):
            keys = _Keys(None)
            try:
                with forwards({self._module(name): _Noise(self.widths[name], seed)}):
                    self.part.compute(**{**arguments, self.cache_name: keys})
            except _KnownError:
                found.append(keys.full)
        return len(found) < 2 or not all(torch.equal(*pair) for pair in zip(*found, strict=True))


def _takes_pairs(arguments: Mapping[str, Any]) -> bool:
    mask = arguments.get(_MASK)
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)


class _Taker:
    """A hook that notes the output of a module."""

    def __init__(self, taken: dict[str, Tensor], name: str) -> None:
        self.taken, self.name = taken, name

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            self.taken[self.name] = output


class _Blank:
    """A forward that gives zeros, without memory of its own."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, inputs: Tensor, *args: object, **kwargs: object) -> Tensor:
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], self.width)


class _Noise:
    """A forward that gives noise, to see where it comes out."""

    def __init__(self, width: int, seed: int) -> None:
        self.width, self.seed = width, seed

    def __call__(self, inputs: Tensor, *args: object, **kwargs: object) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(*inputs.shape[:-1], self.width, generator=generator).to(inputs)


class _Giver:
    """A forward that gives what has been computed."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        return self.given[0]


class _Pick:
    """Picks what belongs to some tokens out of what belongs to all.

    Args:
        rows_R: the sequences.
        places_RK: their tokens.
        shape: (B, T).
    """

    def __init__(self, rows_R: Tensor, places_RK: Tensor, shape: torch.Size) -> None:
        self.rows_R, self.places_RK = rows_R, places_RK
        self.num_rows, self.num_tokens = shape

    def __call__(self, value: Any) -> Any:
        """Return an argument for these tokens: of tensors (B or 1, T, ...), also in tuples, the entries of each."""
        if isinstance(value, tuple | list):
            return type(value)(self(entry) for entry in value)
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            return value
        if value.shape[0] not in (1, self.num_rows) or value.shape[1] != self.num_tokens:
            return value
        return self._take(value)

    def _take(self, value: Tensor) -> Tensor:
        whole = value.expand(self.num_rows, *value.shape[1:])
        return whole[self.rows_R[:, None], self.places_RK]

    def mask(self, mask: Tensor | None, keys: _Keys) -> Tensor | None:
        """Return the mask of pairs (R, 1, K, S); of several tokens without one, each sees itself and what is before."""
        if mask is not None and mask.shape[2] == self.num_tokens:
            return self._take(mask.transpose(1, 2)).transpose(1, 2)
        if mask is not None:
            return mask if mask.shape[0] != self.num_rows else mask[self.rows_R]
        if self.num_tokens == 1:
            return None
        assert keys.full is not None
        places_S = torch.arange(keys.full[0].shape[-2], device=self.places_RK.device)
        return (places_S <= self.places_RK[..., None])[:, None]

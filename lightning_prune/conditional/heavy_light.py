"""Heavy and light branches: a narrow feed-forward part for all tokens, the wide one for a few of each sequence.

    y = light(x) + m heavy(x)

with m the relaxed choice of the k tokens and zero elsewhere. The heavy branch is the model's own feed-forward part, the
light one a copy cut to its best units, by the product of the norms of what reads and writes them. What the light branch
takes over is next to nothing in the output projection of the heavy one, which can learn it again: so with all tokens
chosen and m = 1, as at first, the model computes what it did.

Source: Ainslie et al., CoLT5: Faster Long-Range Transformers with Conditional Computation, arXiv 2303.09752, section 3.
    Ours: it starts from a trained dense model; the choice itself is exact, not iterated, and narrows over a ramp; the
    router reads inputs of unit root mean square; in decoders tokens are judged alone (token_router).
Defaults: light half as wide, epsilon 1.0 and 9 / 8 as many tokens in training are the paper's; share 1 / 8 is that of
    its pretraining (1 / 16 in its tuning on 16,384 tokens).
Cost: light on every token, heavy on the share; the light branch's weights come on top.
Limits: dense feed-forward parts. The paper's two branches of attention are left out: a module of Transformers makes
    queries, keys and values of the same tokens, so that routed queries cannot meet other routed keys; conditional
    adapters route attention, with the whole block.

Shapes: B sequences, T tokens, D features, U units.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.conditional.block_calls import inserting, noting, register
from lightning_prune.conditional.method import ConditionMethod
from lightning_prune.conditional.routed_ffn import Part, RoutedFFN, add_rows, ffn_parts
from lightning_prune.conditional.token_router import NEXT_TO_NOTHING, RoutedTokens, TokenRouter, check_share
from lightning_prune.structured.build import build_smaller
from lightning_prune.structured.groups import Cut, Group, Plan
from lightning_prune.structured.structure import Stack
from lightning_prune.structured.width.unit_scores import Reduction, unit_scores

__all__ = ["HeavyLight", "best_units"]

WIDER = 9 / 8  # of the chosen tokens get a part of the heavy branch while the router learns


@dataclass(frozen=True, kw_only=True)
class HeavyLight(ConditionMethod):
    """Method for long inputs of which a few tokens matter more; see the module text.

    Args:
        share: of the real tokens of a sequence that read the heavy branch.
        light: width of the light branch as a share of the heavy one's.
        epsilon: temperature of the choice, in units of the scores.
        ramp: share of the training over which the choice narrows.
        layers: the blocks that change; all if it is not given.
        seed: of routers.
        rate: see `ConditionMethod`.
    """

    share: float = 0.125
    light: float = 0.5
    epsilon: float = 1.0
    ramp: float = 0.25
    layers: tuple[int, ...] | None = None
    seed: int = 0
    rate: float = 1.0

    def __post_init__(self) -> None:
        check_share(epsilon=self.epsilon, ramp=self.ramp)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if not 0 < self.light < 1:
            raise ValueError(
                f"light must be in (0, 1), got {self.light}; with all units it would be the model's own part"
            )

    def insert(self, model: nn.Module, stack: Stack) -> RoutedTokens:
        """Insert routers and light branches; see `ConditionMethod`."""
        parts, structure, names = ffn_parts(model, stack, self.layers)
        keep = {group.key: best_units(model, group, self.light) for group in structure.of_kind("ffn")}
        cut = Plan(cuts=tuple(Cut(key, units) for key, units in keep.items()))
        small = build_smaller(model, structure, cut, share=True)
        with inserting(model) as undo:
            known = noting([part.block for part in parts], undo)
            routers: list[TokenRouter] = []
            added: dict[str, nn.Module] = {}
            for part in parts:
                light = nn.Sequential(*(copy.deepcopy(small.get_submodule(names[id(m)])) for m in part.modules))
                router = TokenRouter(
                    part.block.call.read.shape[-1],
                    share=self.share,
                    is_causal=part.is_causal,
                    like=part.like,
                    epsilon=self.epsilon,
                    wider=WIDER,
                    seed=self.seed + 7919 * part.block.layer,
                )
                register(part.first, "token_router", router, undo)
                register(part.first, "light", light, undo)
                _HeavyLightFFN(part, known, undo)
                _hand_over(model, part, keep[part.group.key], light, names, undo)
                routers.append(router)
                added |= {
                    f"{names[id(part.first)]}.{name}": m for name, m in (("token_router", router), ("light", light))
                }
        return RoutedTokens(routers, added, undo, ramp=self.ramp)


class _HeavyLightFFN(RoutedFFN):
    """A feed-forward part of two branches."""

    def compute(self, x_BTD: Tensor, keep_BT: Tensor | None) -> Tensor:
        """Return the sum of both."""
        first = self.module
        chosen_BT, scale_BT = first.token_router(x_BTD, keep_BT)  # type: ignore[operator]
        return add_rows(first.light(x_BTD), x_BTD, chosen_BT, scale_BT, self.dense.rows)  # type: ignore[operator]


@torch.no_grad()
def _hand_over(
    model: nn.Module, part: Part, units: tuple[int, ...], light: nn.Sequential, names: dict[int, str], undo: ExitStack
) -> None:
    """Take out of the heavy branch what the light one adds; undone, the light branch's share comes back to it."""
    for member in part.group.readers:
        owner, _, tensor = member.name.rpartition(".")
        place, module = next((i, m) for i, m in enumerate(part.modules) if f"{owner}.".startswith(f"{names[id(m)]}."))
        twin = light[place].get_submodule(owner[len(names[id(module)]) + 1 :])
        heavy, positions = model.get_submodule(owner), member.positions(units)
        _move(heavy.get_parameter(tensor), twin.get_parameter(tensor), member.dim, positions, undo)
        if getattr(heavy, "bias", None) is not None:
            bias = heavy.get_parameter("bias")
            _move(bias, twin.get_parameter("bias"), 0, torch.arange(len(bias)), undo)


def _move(heavy: Tensor, light: Tensor, dim: int, positions: Tensor, undo: ExitStack) -> None:
    positions = positions.to(heavy.device)
    heavy.data.index_copy_(dim, positions, heavy.data.index_select(dim, positions) * NEXT_TO_NOTHING)
    undo.callback(lambda: heavy.data.index_add_(dim, positions, light.detach().to(heavy.dtype)))


def best_units(model: nn.Module, group: Group, share: float) -> tuple[int, ...]:
    """Return the units of a feed-forward part with the largest products of squared norms of what belongs to them."""
    tensors = model.state_dict(keep_vars=True)
    squares = {member.name: tensors[member.name].detach().float().square() for member in group.members}
    score_U = unit_scores(group, squares, Reduction(members="all", within="sum", across="prod"))
    number = group.at_least(round(share * group.num_units))
    return tuple(sorted(score_U.argsort(descending=True, stable=True)[:number].tolist()))

"""Let a token leave the model behind an early block, once what is read there agrees with the model's own answer.

Exits teach themselves: each reads the stream behind its block as the model reads its last one, through a shortcut of
its own, and imitates the model's own distribution; no label is needed and no gradient reaches the model. How sure an
exit is comes from a head that predicts whether the two answers agree, or from the entropy of what it reads. The
threshold is the lowest at which those that would leave agree as often as is wanted, counted while training or on
batches of one's own. Before anything has been counted nothing leaves.

A token is decided at its exit from its own stream alone, which holds what is before it and nothing behind it. Later
blocks are then only asked for its keys and values, made from the stream with which it left, so that later tokens see
it in every layer; at the end the shortcut's stream stands for the last one. Prompts run whole by default; each row of a
batch leaves on its own.

Source: structure as in EE-LLM and EE-Tuning, arXiv 2312.04916 and 2402.00518; the loss is KL(final || exit) and the
    threshold is calibrated, as in self-supervised early exits (Accelerating Large Language Model Inference with
    Self-Supervised Early Exits, arXiv 2407.21082). The linear shortcut in front of the shared norm and head, and the
    learned confidence, are ours; theirs is the entropy.
Cost: D x D + D numbers per exit; training reads every exit, N x D x V multiplications each. `entropy` pays for such a
    reading per exit and token at decoding, `learned` D multiplications.
Limits: `sparse_block` says what is really left out. Thresholds hold for text like that which they were counted on. Keys
    of tokens that left differ from the model's own, so later agreement may be a little lower than counted.

Shapes: B sequences, T tokens, N real tokens, D channels of the stream, E exits, K bins of confidence, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.base import distributed
from lightning_prune.base.bounds import at_least
from lightning_prune.calibration.walk import evaluating
from lightning_prune.conditional.agreement import NUM_BINS, count, threshold
from lightning_prune.conditional.decoder_call import DecoderCall, Noted
from lightning_prune.conditional.imitation import imitate
from lightning_prune.conditional.method import Condition, ConditionMethod
from lightning_prune.conditional.readout import Readout, find_readout
from lightning_prune.conditional.sparse_block import SparseBlock
from lightning_prune.conditional.sparse_trial import make_sparse
from lightning_prune.conditional.stand_in import StandIn, sole_blocks, stream_width, with_hidden
from lightning_prune.structured.depth.bypass import first_tensor
from lightning_prune.structured.structure import Stack

__all__ = ["EarlyExit", "EarlyExitCondition"]


@dataclass(frozen=True)
class EarlyExit(ConditionMethod):
    """Insert exits behind some blocks.

    Args:
        exits: indices of the blocks behind which tokens may leave; by default a quarter, half and three quarters of the
            way.
        agreement: how often the answers of those that leave must be the model's own, in (0, 1].
        confidence: `learned`, or the `entropy` of what is read at the exit.
        positions: which tokens may leave: `decode`, those that are read one at a time; `all`, also those of prompts
            and texts, which then give what decoding them would give.
        weight: of the loss.
        decay: of the counts behind the thresholds, per step.
        rate: multiple of the learning rate for the exits.

    Raises:
        ValueError: if an option is out of range.
    """

    exits: tuple[int, ...] | None = None
    agreement: float = 0.95
    confidence: Literal["learned", "entropy"] = "learned"
    positions: Literal["decode", "all"] = "decode"
    weight: float = 1.0
    decay: float = 0.99
    rate: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.agreement <= 1:
            raise ValueError(f"agreement must lie in (0, 1], got {self.agreement}; 0.95 lets 1 of 20 answers differ")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        for name, value, allowed in (
            ("confidence", self.confidence, ("learned", "entropy")),
            ("positions", self.positions, ("decode", "all")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        at_least(0.0, weight=self.weight, rate=self.rate)

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        if self.exits is None:
            return tuple(sorted({max(0, num_layers * part // 4 - 1) for part in (1, 2, 3)} - {num_layers - 1}))
        if not self.exits or any(not 0 <= layer < num_layers - 1 for layer in self.exits):
            raise ValueError(
                f"exits must be blocks from 0 to {num_layers - 2}, at least one, got {list(self.exits)}; behind the "
                "last block the model ends by itself"
            )
        return tuple(sorted(set(self.exits)))

    def insert(self, model: nn.Module, stack: Stack) -> "EarlyExitCondition":
        """Insert the exits; see `ConditionMethod`.

        Raises:
            ValueError: if the model is no language model, has an encoder and a decoder, has blocks that are not one
                module each, or none of the wanted numbers.
        """
        blocks = sole_blocks(model, stack, "early_exit")
        layers = self._layers(len(blocks))
        width = stream_width(model, blocks, "early_exit")
        readout = find_readout(model, blocks[-1], "early_exit")
        call = ExitCall(model, stack)
        parts = [
            ExitBlock(blocks[layer], width if layer in layers else 0, self, call, readout, layer == len(blocks) - 1)
            for layer in range(layers[0], len(blocks))
        ]
        for part in parts:
            part.install("early_exit")
        condition = EarlyExitCondition(self, stack.containers[0], dict(enumerate(parts, layers[0])), call, readout)
        try:
            make_sparse(model, [part.sparse for part in parts])
        except BaseException:
            condition.remove()
            raise
        return condition


class ExitCall(DecoderCall):
    """The call going on: who has left, and what exits have read."""

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        super().__init__(model, stack)
        self.is_counted = False
        self.gone = Noted()  # `who`, bool (B, T), and `stream`, what stands for the last one, (B, T, D)

    def begin(self, decoder: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Begin a call: nobody has left."""
        super().begin(decoder, args, kwargs)
        self.gone.clear()


class ExitBlock(StandIn):
    """Runs a block for the tokens that have not left, and lets some leave behind it.

    Args:
        block: that it stands in.
        width: D if there is an exit behind the block, else 0.
        options: of the method.
        call: of the decoder.
        readout: of the model.
        is_last: whether the block is the last.
    """

    threshold: Tensor
    seen_K: Tensor
    agreed_K: Tensor

    def __init__(
        self, block: nn.Module, width: int, options: EarlyExit, call: ExitCall, readout: Readout, is_last: bool
    ) -> None:
        super().__init__(block)
        self.options, self.call, self.readout, self.is_last = options, call, readout, is_last
        self.has_exit, self.sparse = width > 0, SparseBlock(self)
        if self.has_exit:
            like = self.like
            self.weight = nn.Parameter(like.new_zeros(width, width))
            self.bias = nn.Parameter(like.new_zeros(width))
            if options.confidence == "learned":
                self.sureness = nn.Parameter(like.new_zeros(width + 1))
            for name in ("seen_K", "agreed_K"):
                self.register_buffer(name, torch.zeros(NUM_BINS, device=like.device))
            self.register_buffer("threshold", torch.full((), float("inf"), device=like.device))

    def shortcut(self, stream: Tensor) -> Tensor:
        """Return what stands for the last stream (..., D)."""
        return stream + functional.linear(stream, self.weight.to(stream.dtype), self.bias.to(stream.dtype))

    def agreeing(self, stream: Tensor) -> Tensor:
        """Return the logit (...), float32, of the two answers agreeing; 0 where it is not learned."""
        if self.options.confidence != "learned":
            return stream.new_zeros(stream.shape[:-1], dtype=torch.float32)
        with torch.autocast(stream.device.type, enabled=False):
            wide = stream.float()
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
            return scaled @ self.sureness[:-1].float() + self.sureness[-1].float()

    def confidence(self, stream: Tensor, short: Tensor) -> Tensor:
        """Return how sure the exit is, float32 (...) in [0, 1]."""
        if self.options.confidence == "learned":
            return torch.sigmoid(self.agreeing(stream))
        log_p = torch.log_softmax(self.readout(short), dim=-1)
        return sureness(-(log_p.exp() * log_p).sum(-1), log_p.shape[-1])

    def run(self, *args: object, **kwargs: object) -> Any:
        """Run the block, and in evaluation only for those that have not left."""
        call = self.call
        if self.training or call.is_counted:  # the whole model, and what exits make of it
            output = self.compute(*args, **kwargs)
            self._note(first_tensor(output).detach())
            return output
        gone_BT = call.gone.get("who")
        output = self.sparse(None if gone_BT is None else ~gone_BT, args, kwargs)
        after_BTD = first_tensor(output)
        if self.has_exit and (after_BTD.shape[1] == 1 or self.options.positions == "all"):
            self._let_leave(after_BTD)
        if self.is_last and gone_BT is not None:
            after_BTD = torch.where(gone_BT[..., None], call.gone["stream"], after_BTD)
        return with_hidden(output, after_BTD)

    def _note(self, stream_BTD: Tensor) -> None:
        read = (self.shortcut(stream_BTD), self.agreeing(stream_BTD)) if self.has_exit else None
        if not self.is_recomputed():
            self.call.noted[self] = read
            if self.is_last:
                self.call.noted["final"] = stream_BTD

    def _let_leave(self, stream_BTD: Tensor) -> None:
        gone, short_BTD = self.call.gone, self.shortcut(stream_BTD)
        leaves_BT = self.confidence(stream_BTD, short_BTD) >= self.threshold
        if "who" not in gone:
            if torch.compiler.is_compiling() or bool(leaves_BT.any()):
                gone["who"], gone["stream"] = leaves_BT, short_BTD
            return
        gone["stream"] = torch.where((leaves_BT & ~gone["who"])[..., None], short_BTD, gone["stream"])
        gone["who"] = gone["who"] | leaves_BT


def sureness(entropy: Tensor, num_answers: int) -> Tensor:
    """Return 1 for an entropy of 0, and 0 for that of answers that are all alike."""
    return 1 - entropy / torch.log(entropy.new_tensor(float(num_answers)))


class EarlyExitCondition(Condition):
    """The exits at work in one model.

    Args:
        options: of the method.
        container: name of the list of blocks.
        parts: by block, from the first exit on.
        call: of the decoder.
        readout: of the model.
    """

    def __init__(
        self, options: EarlyExit, container: str, parts: Mapping[int, ExitBlock], call: ExitCall, readout: Readout
    ) -> None:
        self.options, self.container, self.parts, self.call, self.readout = options, container, parts, call, readout
        self.exits = [part for part in parts.values() if part.has_exit]
        self._imitation: Tensor | None = None
        self._new_E2K: Tensor | None = None

    def added(self) -> Mapping[str, nn.Module]:
        """Return the exits by name, and what stands in the blocks behind them, which has no weights."""
        return {f"{self.container}.{layer}.early_exit": part for layer, part in self.parts.items()}

    def _read(self) -> tuple[list[Tensor], Tensor, Tensor] | None:
        """Return what the exits of the last call have read: short_ND each, sure_EN, and final_ND."""
        noted = self.call.noted
        if "final" not in noted:
            return None
        real_BT = self.call.real(noted["final"])
        keep = slice(None) if real_BT is None else real_BT.flatten()
        found = [noted[part] for part in self.exits]
        shorts = [short.flatten(0, 1)[keep] for short, _ in found]
        return shorts, torch.stack([sure.flatten()[keep] for _, sure in found]), noted["final"].flatten(0, 1)[keep]

    def loss(self) -> Tensor | None:
        """Return the loss of the exits in the last training call: imitation, and sureness where that is learned."""
        read = None if "loss" in self.call.noted else self._read()
        if read is not None:
            self.call.noted["loss"] = self._compared(*read)
        return self.call.noted.get("loss")

    def _compared(self, shorts: list[Tensor], sure_EN: Tensor, final_ND: Tensor) -> Tensor:
        kl_E, agrees_EN, entropy_EN, num_answers = imitate(self.readout, final_ND, shorts)
        loss = kl_E.sum()
        if self.options.confidence == "learned":
            by_token_EN = functional.binary_cross_entropy_with_logits(sure_EN, agrees_EN.float(), reduction="none")
            loss = loss + by_token_EN.sum() / max(1, len(final_ND))
            confidence_EN = torch.sigmoid(sure_EN.detach())
        else:
            confidence_EN = sureness(entropy_EN, num_answers)
        new_E2K, self._left = count(confidence_EN, agrees_EN, [part.threshold for part in self.exits])
        self._new_E2K = new_E2K if self._new_E2K is None else self._new_E2K + new_E2K
        self._imitation = kl_E.detach().mean()
        return self.options.weight * loss

    def after_step(self) -> None:
        """Take what was counted into the thresholds."""
        if self._new_E2K is None:
            return
        for part, new_2K in zip(self.exits, distributed.sum_everywhere(self._new_E2K), strict=True):
            part.seen_K.mul_(self.options.decay).add_(new_2K[0])
            part.agreed_K.mul_(self.options.decay).add_(new_2K[1])
            part.threshold.fill_(threshold(part.seen_K, part.agreed_K, self.options.agreement))
        self._new_E2K = None

    @torch.no_grad()
    def calibrate(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count the thresholds anew on batches, exit by exit: later ones on those that earlier ones leave.

        Args:
            model: the model, unwrapped.
            batches: keyword arguments of its forward; read once per exit.
        """
        batches = list(batches)
        for part in self.exits:
            part.threshold.fill_(float("inf"))
        self.call.is_counted = True
        try:
            for number, part in enumerate(self.exits):
                self._new_E2K = None
                with evaluating(model):
                    for batch in batches:
                        self.call.noted.clear()
                        model(**batch)
                        self.loss()
                assert self._new_E2K is not None
                new_2K = distributed.sum_everywhere(self._new_E2K)[number]
                part.seen_K.copy_(new_2K[0])
                part.agreed_K.copy_(new_2K[1])
                part.threshold.fill_(threshold(part.seen_K, part.agreed_K, self.options.agreement))
        finally:
            self.call.is_counted, self._new_E2K = False, None
            self.call.noted.clear()

    def metrics(self) -> dict[str, float]:
        """Return of the last training call: how far exits are from the model, how many would leave, how they agree."""
        if self._imitation is None:
            return {}
        left, agreed, total = (float(value) for value in self._left)
        found = {"imitation": float(self._imitation), "exit_share": left / max(1.0, total)}
        return found if left == 0 else {**found, "exit_agreement": agreed / left}

    def remove(self) -> None:
        """Take the exits out."""
        for part in self.parts.values():
            part.remove()
        self.call.remove()

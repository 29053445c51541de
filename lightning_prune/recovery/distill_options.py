"""The options of a distillation: what a recipe's section `recover.distill` holds.

Source: defaults, arXiv 2407.14679, section 3: forward KL alone at temperature 1 over the whole vocabulary.
"""

from dataclasses import dataclass, field

from lightning_prune.recovery.divergences import Divergence, ForwardKL
from lightning_prune.recovery.matching import Attention, Hidden
from lightning_prune.recovery.teacher import Dtype
from lightning_prune.recovery.token_loss import TokenLoss

__all__ = ["Distill"]


@dataclass(frozen=True, kw_only=True)
class Distill:
    """What the student learns from the teacher.

    The loss per token is `scale * loss(teacher, student) + ce_weight * cross-entropy + hidden + attention`.

    Args:
        teacher: `self` for the model as it is before pruning, or a folder or hub id.
        loss: divergence on logits.
        temperature: divides both sides' logits.
        squared_temperature: multiply the divergence by the temperature's square, so that its gradient does not shrink.
        top_k: compare the teacher's likeliest tokens and all others as one; None compares the whole vocabulary. Under
            100 costs quality (arXiv 2407.14679).
        ce_weight: of the labels' cross-entropy; 0 is best in arXiv 2407.14679, 0.5 in AST for GPT-2.
        hidden: term on hidden states, worth it for strong cuts in depth.
        attention: term on attention.
        cache_dir: folder for the teacher's top-k logits, so that it runs once per text; needs top_k.
        teacher_dtype: of the teacher's weights; None leaves them.
        offload: keep the teacher's weights on the CPU and move them layer by layer.
        num_tokens: compare the first so many logits; for heads padded to different sizes over one tokenizer.
    """

    teacher: str = "self"
    loss: Divergence = field(default_factory=ForwardKL)
    temperature: float = 1.0
    squared_temperature: bool = False
    top_k: int | None = None
    ce_weight: float = 0.0
    hidden: Hidden | None = None
    attention: Attention | None = None
    cache_dir: str | None = None
    teacher_dtype: Dtype | None = None
    offload: bool = False
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature must be above 0, got {self.temperature}")
        if self.squared_temperature and self.temperature == 1.0:
            raise ValueError("distill.squared_temperature has no effect at temperature 1; set another or leave it out")
        if not self.ce_weight >= 0:
            raise ValueError(f"distill.ce_weight must be 0 or more, got {self.ce_weight}")
        for name, value in (("top_k", self.top_k), ("num_tokens", self.num_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"distill.{name} must be 1 or more, got {value}")
        if self.cache_dir is not None and self.top_k is None:
            raise ValueError("distill.cache_dir stores the likeliest tokens only; set distill.top_k, for example 100")
        if self.cache_dir is not None and (self.hidden or self.attention):
            raise ValueError(
                "distill.cache_dir holds logits, but hidden and attention need the teacher in every step; leave out one"
            )

    @property
    def token_loss(self) -> TokenLoss:
        """Return the loss on logits."""
        return TokenLoss(
            divergence=self.loss,
            temperature=self.temperature,
            scale=self.temperature**2 if self.squared_temperature else 1.0,
            ce_weight=self.ce_weight,
            num_tokens=self.num_tokens,
        )

    @property
    def wanted(self) -> dict[str, str]:
        """Return the outputs needed besides logits, and the arguments that ask for them."""
        return ({"hidden_states": "output_hidden_states"} if self.hidden else {}) | (
            {"attentions": "output_attentions"} if self.attention else {}
        )

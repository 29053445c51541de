"""What a training call of the student was given, and what it returned besides logits: seen through hooks.

A training call is one with gradients: of a model in training mode, or in any mode where it is given labels and the loss
in its output is replaced, since `from_pretrained` gives a model in evaluation mode and Lightning leaves it so. The
hooks ask for hidden states and attention where a distillation needs them, and take them out of what the caller sees if
it did not ask itself.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["StudentCall", "StudentCalls"]

# Arguments that ask the student for a loss or for further outputs: the teacher is asked for what is needed of it.
_NOT_FOR_TEACHER = frozenset(
    {
        "labels",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


def _is_for_student_alone(name: str) -> bool:
    """Return whether an argument means nothing to a teacher; `instruction_` begins what only a mask predictor reads."""
    return name in _NOT_FOR_TEACHER or name.startswith("instruction_")


@dataclass
class StudentCall:
    """One training call: what the teacher must see, the labels, and the outputs taken along by name."""

    inputs: dict[str, object]
    labels: Tensor | None
    shift_labels: Tensor | None
    num_items: Tensor | int | None
    outputs: dict[str, Sequence[Tensor]] = field(default_factory=dict)


class StudentCalls:
    """Hooks on the student.

    Args:
        model: the language model that is trained, perhaps with adapters.
        wanted: outputs to take along: name in the output -> name of the argument that asks for it.
        replace_loss: gives the loss of a call that came with labels; None leaves the loss to the caller.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        wanted: Mapping[str, str],
        replace_loss: Callable[[StudentCall, Any], Tensor] | None,
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._replace_loss = replace_loss
        self._signature = inspect.signature(model.forward)
        self._asked: frozenset[str] = frozenset()
        self._call: StudentCall | None = None
        self._is_training = False
        self.shift_labels: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(torch.compiler.disable(self._before), with_kwargs=True),
            model.register_forward_hook(torch.compiler.disable(self._after)),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> StudentCall:
        """Return the training call that came last, once.

        Raises:
            ValueError: if there was none since the last time.
        """
        call, self._call = self._call, None
        if call is None:
            raise ValueError(
                "distillation was asked for a loss, but the model it is attached to was not called with gradients "
                "before; call it once per loss, and use DistributedDataParallel in place of DataParallel"
            )
        return call

    def _before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[object, ...], dict[str, Any]] | None:
        if module is not self._model:  # a copy, as the self-teacher may be one
            return None
        self.shift_labels = kwargs.get("shift_labels")
        self._is_training = False
        if not torch.is_grad_enabled():
            return None
        kwargs = self._by_name(args) | kwargs
        if not (module.training or (self._replace_loss is not None and kwargs.get("labels") is not None)):
            return None
        self._is_training = True
        is_recomputed = torch._C._current_graph_task_id() != -1
        if is_recomputed and self._replace_loss is not None:
            raise ValueError(
                "the whole model is recomputed in the backward pass, and the distillation's loss in it; checkpoint its "
                "blocks instead: model.activation_checkpointing_enable(), or gradient_checkpointing_enable() in "
                "Transformers 4"
            )
        kwargs |= self._decoder_inputs(kwargs)
        if not is_recomputed:
            self._call = self._read(kwargs)
        if self._replace_loss is not None:
            kwargs.pop("labels", None)
        self._asked = frozenset(argument for argument in self._wanted.values() if kwargs.get(argument))
        return (), kwargs | dict.fromkeys(self._wanted.values(), True)

    def _read(self, kwargs: Mapping[str, Any]) -> StudentCall:
        if self._replace_loss is not None and kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
            raise ValueError(
                "distillation replaces the model's loss, but the model was called with gradients but without labels; "
                "pass labels with input_ids (-100 where a token does not count)"
            )
        if kwargs.get("input_ids") is None:
            raise ValueError("distillation needs input_ids: embeddings of the student mean nothing to a teacher")
        if kwargs.get("past_key_values") is not None:
            raise ValueError("distillation takes whole sequences; call the model without past_key_values")
        return StudentCall(
            {key: value for key, value in kwargs.items() if not _is_for_student_alone(key)},
            kwargs.get("labels"),
            kwargs.get("shift_labels"),
            kwargs.get("num_items_in_batch"),
        )

    def _by_name(self, args: tuple[object, ...]) -> dict[str, object]:
        """Return the names of positional arguments and their values."""
        if not args:
            return {}
        bound = self._signature.bind_partial(*args)
        kinds = {self._signature.parameters[name].kind for name in bound.arguments}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            raise ValueError(
                f"{type(self._model).__name__} does not name its positional arguments; call it as model(input_ids=...)"
            )
        return dict(bound.arguments)

    def _decoder_inputs(self, kwargs: Mapping[str, Any]) -> dict[str, object]:
        """Return the decoder's inputs that an encoder-decoder would make from the labels by itself."""
        make = getattr(self._model, "prepare_decoder_input_ids_from_labels", None)
        is_given = kwargs.get("decoder_input_ids") is not None or kwargs.get("decoder_inputs_embeds") is not None
        if make is None or is_given or kwargs.get("labels") is None:
            return {}
        return {"decoder_input_ids": make(labels=kwargs["labels"])}

    def _after(self, module: nn.Module, args: object, output: Any) -> Any:
        if module is not self._model or not self._is_training:
            return None
        if self._call is None or torch._C._current_graph_task_id() != -1:
            return self._without_extras(output)
        if not isinstance(output, Mapping):
            raise ValueError(
                f"distillation reads the model's outputs by name, but it returned {type(output).__name__}; "
                "call it with return_dict=True"
            )
        self._call.outputs = {name: output[name] for name in self._wanted if output.get(name) is not None}
        if self._replace_loss is None:
            return self._without_extras(output)
        loss = self._replace_loss(self.take(), output)
        return self._without_extras(output, loss=loss)

    def _without_extras(self, output: Any, **new: Tensor) -> Any:
        """Return the output without what only the distillation asked for; the loss, if there is a new one, first."""
        extras = {name for name, argument in self._wanted.items() if argument not in self._asked}
        kept = {name: value for name, value in output.items() if name not in extras and name not in new}
        return output if not new and len(kept) == len(output) else type(output)(**new, **kept)

"""Find the Hugging Face model inside what a trainer trains, and put another in its place."""

from torch import nn

__all__ = ["check_answers_tasks", "language_model", "replace_module"]


def language_model(module: nn.Module) -> nn.Module | None:
    """Return the outermost Hugging Face model in a module, wrappers looked through, or None."""
    if hasattr(module, "config") and callable(getattr(module, "save_pretrained", None)):
        return module
    return next((found for child in module.children() if (found := language_model(child)) is not None), None)


def check_answers_tasks(model: nn.Module) -> None:
    """Check that a model gives probabilities of texts, as evaluation tasks ask for them.

    Raises:
        ValueError: if it does not predict tokens: a classifier, a reward model, a bare encoder.
    """
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and not can_generate():
        raise ValueError(
            f"tasks ask a language model for the probability of texts, and {type(model).__name__} gives none; set "
            "evaluate: null, or measure it with a program of your own"
        )


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module in the place of another, under every name it has.

    Returns:
        the root; if it is itself replaced, the new module.
    """
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old and parent is not new:
                setattr(parent, name, new)
    return root

"""Classes of models with per-layer shapes: as objects in memory, and as the text of a file that goes with a model."""

import ast
import functools
import inspect
from pathlib import Path
from typing import Any

from transformers import AutoModel
from transformers.models.auto import modeling_auto

from lightning_prune.integrations.per_layer import per_layer_model
from lightning_prune.integrations.per_layer.per_layer_model import PerLayerConfig, PerLayerModel, strictly
from lightning_prune.structured.depth import shared_block

__all__ = ["SavedWithCode", "auto_map", "modelling_file", "modelling_source", "per_layer_classes", "stock_class_of"]

_AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}
_CONFIG = '''

@strictly
class {config}(PerLayerConfig, {stock_config}):
    """The configuration of a stock model, with fields that differ per block."""

    model_type = "{model_type}"
'''
_MODEL = '''

class {name}(PerLayerModel, {stock}):
    """A {stock} whose blocks differ in shape."""

    config_class = {config}
    stock_class = {stock}
'''
# Some heads make the blocks under them by asking AutoModel for the class that goes with the configuration.
_REGISTER = """

AutoModel.register({config}, {base}, exist_ok=True)
"""


class SavedWithCode:
    """Mixed into classes that exist in memory alone: what is saved or pushed carries the file that opens it."""

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the model as its stock class does, and its modelling file; see Transformers for the arguments."""
        model: Any = self
        model.config.auto_map = auto_map(model.stock_class)
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            source = modelling_source(model.stock_class)
            (folder / modelling_file(model.stock_class)).write_text(source, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


def stock_class_of(model_class: type) -> Any:
    """Return the class of Transformers that a class with per-layer shapes was made from, or the class itself."""
    return getattr(model_class, "stock_class", model_class)


@functools.cache
def per_layer_classes(stock_class: Any) -> tuple[Any, Any]:
    """Return the classes of configurations and of models with per-layer shapes that go with a stock class."""
    stock_config = stock_class.config_class
    names = {"model_type": _model_type(stock_class), "__module__": __name__}
    config_class: Any = strictly(type(_pruned(stock_config), (PerLayerConfig, stock_config), names))
    names = {"config_class": config_class, "stock_class": stock_class, "__module__": __name__}
    base = _heads(stock_class).get("AutoModel")
    if base is not None:
        bases = (SavedWithCode, PerLayerModel, base)
        AutoModel.register(config_class, type(_pruned(base), bases, {**names, "stock_class": base}), exist_ok=True)
    return config_class, type(_pruned(stock_class), (SavedWithCode, PerLayerModel, stock_class), names)


def modelling_file(stock_class: Any) -> str:
    """Return the name of the file that holds the classes."""
    return f"modeling_{_model_type(stock_class)}.py"


def auto_map(stock_class: Any) -> dict[str, str]:
    """Return auto class -> where an exported folder has the class for it.

    Raises:
        ValueError: if no auto class of Transformers opens the stock class.
    """
    heads = _heads(stock_class)
    if stock_class not in heads.values():
        raise ValueError(
            f"{stock_class.__name__} is opened by none of {', '.join(_AUTO_CLASSES)}, so nothing could open a folder "
            "with shapes per block; plan with a uniform budget"
        )
    module = Path(modelling_file(stock_class)).stem
    return {
        "AutoConfig": f"{module}.{_pruned(stock_class.config_class)}",
        **{auto: f"{module}.{_pruned(head)}" for auto, head in heads.items()},
    }


def modelling_source(stock_class: Any) -> str:
    """Return the text of a file with the classes for all heads; it needs torch and transformers alone."""
    stock_config = stock_class.config_class
    by_auto = _heads(stock_class)
    heads = list(dict.fromkeys(by_auto.values()))
    config = _pruned(stock_config)
    own_import = f"from {shared_block.__name__} import share_block\n\n"
    template = inspect.getsource(per_layer_model)
    assert template.count(own_import) == 1
    template = template.replace(own_import, "")
    listed = "\n".join(f"from {found.__module__} import {found.__name__}" for found in (stock_config, *heads))
    first_import = "from torch import Tensor, nn\n"
    assert template.count(first_import) == 1
    further, definitions = _imports_and_definitions(inspect.getsource(shared_block))
    imports = "".join(f"{line}\n" for line in further if f"{line}\n" not in template)
    imports += f"{first_import}from transformers import AutoModel\n{listed}\n"
    return (
        template.replace(first_import, imports)
        + definitions
        + _CONFIG.format(config=config, stock_config=stock_config.__name__, model_type=_model_type(stock_class))
        + "".join(_MODEL.format(name=_pruned(head), stock=head.__name__, config=config) for head in heads)
        + (_REGISTER.format(config=config, base=_pruned(by_auto["AutoModel"])) if "AutoModel" in by_auto else "")
    )


def _imports_and_definitions(source: str) -> tuple[list[str], str]:
    """Return the import lines of a file, and its text from the first class or function on."""
    body = ast.parse(source).body
    imports = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    first = next(node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    return imports, "\n\n" + "".join(source.splitlines(keepends=True)[first.lineno - 1 :])


def _model_type(stock_class: Any) -> str:
    return f"pruned_{stock_class.config_class.model_type}"


def _pruned(stock: Any) -> str:
    return f"Pruned{stock.__name__}"


def _heads(stock_class: Any) -> dict[str, Any]:
    """Return auto class -> stock class, for all heads that go on the same blocks."""
    found: dict[str, Any] = {}
    for auto, mapping in _AUTO_CLASSES.items():
        head: Any = getattr(modeling_auto, mapping).get(stock_class.config_class, None)
        if isinstance(head, type):
            found[auto] = head
    return found

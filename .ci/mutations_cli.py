"""The mechanisms of recipes and of the command line, for mutations.py."""

from mutation import Mutation

CORE, RECIPE, CLI = "lightning_prune", "tests/test_recipe.py", "tests/test_cli.py"
ADAPTERS, TESTS = "integrations", "tests/integrations"
MUTATIONS = (
    Mutation(
        "a key stands once in its mapping",
        f"{CORE}/recipe_yaml.py",
        "            _check_keys(node)",
        "            pass",
        f"{RECIPE} -k no_recipe",
    ),
    Mutation(
        "aliases are bounded by what they unfold to",
        f"{CORE}/recipe_yaml.py",
        "        if size > _MAX_NODES:",
        "        if False:",
        f"{RECIPE} -k no_recipe",
    ),
    Mutation(
        "null stands only where nothing is a choice",
        f"{CORE}/recipe_values.py",
        "        if type(None) in options:",
        "        if True:",
        f"{RECIPE} -k cannot_stand",
    ),
    Mutation(
        "numbers of a recipe are finite",
        f"{CORE}/recipe_values.py",
        "        return math.isfinite(value)",
        "        return True",
        f"{RECIPE} -k cannot_stand",
    ),
    Mutation(
        "text of a recipe is not empty",
        f"{CORE}/recipe_values.py",
        " and bool(value.strip())",
        "",
        f"{RECIPE} -k cannot_stand",
    ),
    Mutation(
        "another class keeps no option of the one before",
        f"{CORE}/recipe.py",
        "        node.clear()",
        "        pass",
        f"{RECIPE} -k keeps_no_option",
    ),
    Mutation(
        "a class goes by its name in any case",
        f"{CORE}/names.py",
        """.replace("_", "").replace("-", "").casefold()""",
        "",
        f"{RECIPE} -k any_case",
    ),
    Mutation(
        "options of a LoRA are checked when the recipe is loaded",
        f"{CORE}/recipe_sections.py",
        """        if values.get("r", 1) < 1:""",
        "        if False:",
        f"{RECIPE} -k names_the_file",
    ),
    Mutation(
        "a message is one short line",
        f"{CORE}/names.py",
        "    return text if len(text) <= length else",
        "    return text if True else",
        f"{RECIPE} -k mutants",
    ),
    Mutation(
        "the command line answers before torch is imported",
        f"{CORE}/registry.py",
        "import functools",
        "import functools\nimport torch",
        "tests/test_architecture.py -k answers_before",
    ),
    Mutation(
        "a recipe imports no torchmetrics",
        f"{CORE}/recipe_sections.py",
        "recovery.reconstruct_options import",
        "recovery.reconstruct import",
        "tests/test_architecture.py -k nothing_slow_beside",
    ),
    Mutation(
        "a model writes the text it is calibrated on",
        f"{ADAPTERS}/calibration_text.py",
        "        if documents is None and self.data is None and not predicts_next_token(model):",
        "        if documents is None and self.data is None:",
        f"{TESTS}/test_calibration_text.py -k none_is_named",
    ),
    Mutation(
        "own text depends on its seed",
        f"{ADAPTERS}/self_text.py",
        "        torch.manual_seed(seed)",
        "        pass",
        f"{TESTS}/test_self_text.py -k seed_alone",
    ),
    Mutation(
        "own text ends where the model ends it",
        f"{ADAPTERS}/self_text.py",
        "    return ids[: end + 1]",
        "    return ids",
        f"{TESTS}/test_self_text.py -k end_where",
    ),
    Mutation(
        "a damaged text of the cache is written again",
        f"{ADAPTERS}/self_text.py",
        """ and content.get("sha256") == _sum(content["ids"])""",
        "",
        f"{TESTS}/test_self_text.py -k when_damaged",
    ),
    Mutation(
        "the loss is measured on text that was held out",
        f"{ADAPTERS}/calibration_text.py",
        "ids_NT[number:], origin)",
        "ids_NT[:number], origin)",
        f"{TESTS}/test_calibration_text.py -k held_out",
    ),
    Mutation(
        "every one-shot run tells the loss before and after",
        f"{ADAPTERS}/hf_oneshot.py",
        """    passages.tell(before, passages.loss(network, title="loss after"))""",
        "    pass",
        f"{TESTS}/test_calibration_text.py -k tells_the_loss",
    ),
    Mutation(
        "chats are read as the tokenizer's template writes them",
        f"{ADAPTERS}/calibration_text.py",
        "        if document.messages and is_chat:",
        "        if False:",
        f"{TESTS}/test_calibration_text.py -k chats_are_read",
    ),
)

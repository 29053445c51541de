"""The mechanisms of opening, discovering and proving, for mutations.py."""

from mutation import Mutation

ADAPTERS, ADAPTERS_TESTS = "integrations", "tests/integrations"
DISCOVERY, DISCOVERY_TESTS = "lightning_prune/structured/discovery", "tests/structured/discovery"
MUTATIONS = (
    Mutation(
        "a model opens as the class its folder names",
        f"{ADAPTERS}/hf_open.py",
        "return stock, declared[0]",
        "return transformers.AutoModel, declared[0]",
        f"{ADAPTERS_TESTS}/test_hf_open.py -k went_in",
    ),
    Mutation(
        "weights that are missing or left over are an error",
        f"{ADAPTERS}/hf_open.py",
        "_check_complete(name, class_name, info)\n    return",
        "return",
        f"{ADAPTERS_TESTS}/test_hf_open.py -k refused_by_name",
    ),
    Mutation(
        "a tokenizer that was made up is none",
        f"{ADAPTERS}/hf_open.py",
        "if not is_folder or has_files:",
        "if True:",
        f"{ADAPTERS_TESTS}/test_hf_open.py -k went_in",
    ),
    Mutation(
        "text is refused where it cannot teach",
        f"{ADAPTERS}/hf_calibration.py",
        "if (takes_gradients or compares_logits) and not has_labels:",
        "if False:",
        f"{ADAPTERS_TESTS}/test_hf_calibration.py -k cannot_teach",
    ),
    Mutation(
        "tasks are refused for models that predict no tokens",
        f"{ADAPTERS}/language_model.py",
        "if callable(can_generate) and not can_generate():",
        "if False:",
        f"{ADAPTERS_TESTS}/test_hf_open.py -k probabilities",
    ),
)

"""The mechanisms that old and new versions of other libraries need, for mutations.py."""

from mutation import Mutation

ADAPTERS, TESTS = "integrations", "tests/integrations"
MUTATIONS = (
    Mutation(
        "a model without a tokenizer trains in Lightning",
        "integrations/trainers/lightning_trainer.py",
        "    return open_tokenizer(folder)\n",
        "    from transformers import AutoTokenizer\n\n    return AutoTokenizer.from_pretrained(folder)\n",
        "tests/integrations/trainers/test_lightning_trainer.py -k without_a_tokenizer",
    ),
    Mutation(
        "a teacher without a tokenizer is told",
        "integrations/runs/hf_teacher.py",
        "    if teacher_tokenizer is None:\n",
        "    if False:\n",
        "tests/integrations/runs/test_hf_teacher.py -k another_tokenizer",
    ),
    Mutation(
        "the best checkpoint is a pruned one also where its step is unknown",
        "integrations/trainers/hf_trainer.py",
        "best_at = self._saved_at",
        "pass",
        "tests/integrations/trainers/test_hf_trainer.py -k may_be_unknown",
    ),
    Mutation(
        "a best checkpoint of an earlier process stays the best",
        "integrations/trainers/hf_trainer.py",
        "self._saved, self._written_at, self._saved_at = {}, -1, state.global_step",
        "self._saved, self._written_at, self._saved_at = {}, -1, 0",
        "tests/integrations/trainers/test_hf_trainer.py -k may_be_unknown",
    ),
    Mutation(
        "recomputing by re-entry above frozen embeddings is refused",
        "integrations/trainers/hf_trainer.py",
        'if how.get("use_reentrant"):',
        "if False:",
        "tests/integrations/runs/test_recovery_run.py -k re_entry",
    ),
    Mutation(
        "activations above frozen embeddings are recomputed with gradients",
        "integrations/trainers/hf_trainer.py",
        'setattr(args, f"{name}_kwargs", how | {"use_reentrant": False})',
        "pass",
        "tests/integrations/runs/test_recovery_run.py -k re_entry",
    ),
    Mutation(
        "embeddings that were told to pass gradients are taken at their word",
        "integrations/trainers/hf_trainer.py",
        ' or hasattr(model, "_require_grads_hook")',
        "",
        "tests/integrations/runs/test_recovery_run.py -k re_entry",
    ),
)

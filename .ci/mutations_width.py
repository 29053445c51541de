"""The mechanisms of width and depth cuts and of their plans, for mutations.py."""

from mutation import Mutation

STRUCTURED, TESTS = "lightning_prune/structured", "tests/structured"
MUTATIONS = (
    Mutation(
        "an interrupted plan leaves the values as they were",
        f"{STRUCTURED}/undo.py",
        "        for data, dim, positions, values in reversed(self._values):",
        "        for data, dim, positions, values in []:",
        f"{TESTS}/width/test_block_by_block.py -k no_trace",
    ),
    Mutation(
        "an interrupted plan leaves modules, hooks and modes as they were",
        f"{STRUCTURED}/undo.py",
        "            noted.restore()",
        "            pass",
        f"{TESTS}/test_undo.py",
    ),
    Mutation(
        "overlapping changes are undone in reverse",
        f"{STRUCTURED}/undo.py",
        "reversed(self._values)",
        "self._values",
        f"{TESTS}/test_undo.py -k all_that",
    ),
    Mutation(
        "an interrupted cut leaves the optimizers as they were",
        f"{STRUCTURED}/undo.py",
        "            optimizer.restore()",
        "            pass",
        f"{TESTS}/test_undo.py -k optimizers",
    ),
)

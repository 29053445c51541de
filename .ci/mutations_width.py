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
    Mutation(
        "experts are never fewer than the router picks",
        f"{STRUCTURED}/groups.py",
        "        if number < self.min_units:",
        "        if False:",
        f"{TESTS}/discovery/test_routing.py -k keeps_as_many",
    ),
    Mutation(
        "experts stay equally many in the groups that a router chooses among",
        f"{STRUCTURED}/discovery/routing.py",
        "    if not outer:",
        "    if True:",
        f"{TESTS}/discovery/test_routing.py -k equally_many",
    ),
    Mutation(
        "correction biases are masked like the logits they are added to",
        f"{STRUCTURED}/discovery/expert_mask.py",
        '(is_product or getattr(func, "__name__", "") in _ADDING)',
        "is_product",
        f"{TESTS}/discovery/test_routing.py -k correction",
    ),
    Mutation(
        "units of stacked experts come in whole rows",
        f"{STRUCTURED}/discovery/proposals.py",
        "compensations(_in_rows(groups), self.roles)",
        "compensations(groups, self.roles)",
        f"{TESTS}/discovery/test_routing.py -k sixteen",
    ),
    Mutation(
        "padding sends no expert a token",
        f"{STRUCTURED}/width/expert_usage.py",
        "        indices_TK = indices_TK[keep.reshape(-1).to(indices_TK.device)]",
        "        pass",
        f"{TESTS}/width/test_expert_usage.py -k padding",
    ),
    Mutation(
        "later experts are rated without the earlier ones that go",
        f"{STRUCTURED}/width/block_by_block.py",
        "            self.around.enter_context(routed_around(self.model, {group.key: group}, [Cut(group.key, keep)]))",
        "            pass",
        f"{TESTS}/width/test_expert_usage.py -k by_default",
    ),
    Mutation(
        "a gradual shrinking that removes nothing is refused",
        f"{STRUCTURED}/gradual.py",
        "        if all(number == group.num_units for number, group in zip(left, groups, strict=True)):",
        "        if False:",
        f"{TESTS}/test_gradual.py -k removes_nothing",
    ),
    Mutation(
        "the tokenizer of a folder with shapes per block opens without its code",
        "integrations/per_layer_model.py",
        "                values |= dict.fromkeys(_SHARING)",
        "                pass",
        "tests/integrations/test_per_layer_export.py -k tokenizer_opens",
    ),
    Mutation(
        "no stock class invents weights for blocks that share",
        "integrations/per_layer_model.py",
        '                fields[names.get("num_attention_heads", "num_attention_heads")] = None',
        "                pass",
        "tests/integrations/test_per_layer_export.py -k tokenizer_opens",
    ),
)

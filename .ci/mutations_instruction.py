"""The mechanisms of instruction-following pruning, for mutations.py."""

from mutation import Mutation

PREDICTORS, CONDITIONAL, ADAPTERS = (
    "lightning_prune/predictors",
    "lightning_prune/conditional",
    "integrations/instruction",
)
CHOICE = "tests/predictors/test_soft_top_k.py"
INSTRUCTION = "tests/conditional/test_instruction.py"
RUN = "tests/integrations/instruction/test_condition_run.py"
MUTATIONS = (
    Mutation(
        "double precision is kept throughout the choice",
        f"{PREDICTORS}/soft_top_k.py",
        ".to(scores_N.dtype).log()",
        ".log()",
        f"{CHOICE} -k closed_form",
    ),
    Mutation(
        "the fixed sum takes its share of the gradient back",
        f"{PREDICTORS}/soft_top_k.py",
        "slope_N * (grad_N - mean) / epsilon",
        "slope_N * grad_N / epsilon",
        f"{CHOICE} -k closed_form",
    ),
    Mutation(
        "masks hold exactly k entries",
        f"{PREDICTORS}/soft_top_k.py",
        "soft_N = soft_N * kept(scores_N.detach(), k)",
        "soft_N = soft_N * 1",
        f"{CHOICE} -k exactly_k",
    ),
    Mutation(
        "recomputed blocks are given the masks of their first computation",
        f"{CONDITIONAL}/instruction.py",
        "            units.pass_through_checkpoints()",
        "            pass",
        f"{INSTRUCTION} -k recomputed",
    ),
    Mutation(
        "recomputation without masks is refused",
        f"{PREDICTORS}/unit_masks.py",
        "torch._C._current_graph_task_id() != -1",
        "False",
        f"{INSTRUCTION} -k other_means",
    ),
    Mutation(
        "a cache keeps the masks it was filled under",
        f"{CONDITIONAL}/instruction.py",
        "            setattr(found, _CACHE_MARK, masks)",
        "            pass",
        f"{INSTRUCTION} -k generation",
    ),
    Mutation(
        "a copy of a model has an encoder of its own",
        f"{PREDICTORS}/encoder.py",
        "weakref.ref(memo.get(id(model), model))",
        "weakref.ref(model)",
        f"{INSTRUCTION} -k copy",
    ),
    Mutation(
        "the instruction is read wherever padding stands",
        f"{PREDICTORS}/prompt.py",
        "read_BT = there_BT & ((labels_BT != IGNORED)",
        "read_BT = ((labels_BT != IGNORED)",
        f"{INSTRUCTION} -k padding",
    ),
    Mutation(
        "rows without an instruction are refused",
        f"{PREDICTORS}/prompt.py",
        "if not bool(read_BT.any(-1).all()):",
        "if False:",
        f"{INSTRUCTION} -k without_an_instruction",
    ),
    Mutation(
        "a chunk that is read counts no more towards the loss",
        f"{CONDITIONAL}/instruction.py",
        "            if prompt.labels is not None:",
        "            if False:",
        f"{INSTRUCTION} -k chunks",
    ),
    Mutation(
        "masks are ramped in",
        f"{PREDICTORS}/mask_predictor.py",
        "        if not self.training:",
        "        if True:",
        f"{INSTRUCTION} -k ramped",
    ),
    Mutation(
        "evaluation holds the whole budget",
        f"{CONDITIONAL}/instruction.py",
        "        if self.model.training:\n            prompt",
        "        if True:\n            prompt",
        f"{INSTRUCTION} -k drawn",
    ),
    Mutation(
        "units of experts are refused",
        f"{PREDICTORS}/unit_masks.py",
        "if any(member.expert is not None for member in group.readers):",
        "if False:",
        f"{INSTRUCTION} -k experts",
    ),
    Mutation(
        "looking at the training data leaves no trace",
        f"{ADAPTERS}/condition_run.py",
        "        with _unnoticed():",
        "        if True:",
        f"{RUN} -k no_trace",
    ),
    Mutation(
        "the predictor has a rate of its own",
        f"{ADAPTERS}/rates.py",
        "value * rate if name in _RATES else value",
        "value",
        f"{RUN} -k rate_of_its_own",
    ),
    Mutation(
        "schedules know the new group",
        f"{ADAPTERS}/rates.py",
        "            _extend(schedule, optimizer, sources, rate)",
        "            pass",
        f"{RUN} -k rate_of_its_own",
    ),
    Mutation(
        "batches whose labels are taken away are marked",
        f"{ADAPTERS}/marking.py",
        '            batch["instruction_mask"] =',
        "            unused =",
        f"{RUN} -k mark",
    ),
    Mutation(
        "a collapse ends the training where the recipe says so",
        f"{ADAPTERS}/condition_run.py",
        "            if guard.stops:",
        "            if False:",
        f"{RUN} -k collapse",
    ),
)

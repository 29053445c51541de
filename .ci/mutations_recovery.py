"""The mechanisms of recovery, for mutations.py."""

from mutation import Mutation

CORE, ADAPTERS = "lightning_prune", "integrations"
RECOVERY, RECOVERY_TESTS = "lightning_prune/recovery", "tests/recovery"
MUTATIONS = (
    Mutation(
        "a low-rank update stays inside the mask",
        f"{RECOVERY}/low_rank.py",
        "_product(down_RI, up_OR, scale).mul_(mask_OI.view(torch.uint8))",
        "_product(down_RI, up_OR, scale)",
        "tests/integrations/test_peft_lora.py -k peft_itself",
    ),
    Mutation(
        "the update's gradient is that of the masked product",
        f"{RECOVERY}/low_rank.py",
        'grad_OI = grad_OI.mul_(weight_OI if ctx.form == "scaled" else mask_OI.view(torch.uint8))',
        "pass",
        f"{RECOVERY_TESTS}/test_low_rank.py -k gradients",
    ),
    Mutation(
        "a plain LoRA refuses to fill zeros",
        f"{ADAPTERS}/peft_layers.py",
        "if num_zeros > 0.01 * keep.numel() and",
        "if False and",
        "tests/integrations/test_peft_lora.py -k refuses_to_merge",
    ),
    Mutation(
        "stock PEFT refuses an adapter that is no plain LoRA",
        f"{ADAPTERS}/peft_lora.py",
        "config.init_lora_weights = _MARKS[form]",
        "pass",
        "tests/integrations/test_peft_lora.py -k refused_by_stock",
    ),
    Mutation(
        "an adapter brings the masks it was trained with",
        f"{ADAPTERS}/peft_lora.py",
        "_saved_masks(folder) if masks is None else masks",
        "masks",
        "tests/integrations/test_peft_lora.py -k knows_the_masks",
    ),
    Mutation(
        "a merge can be undone bit for bit",
        f"{ADAPTERS}/peft_layers.py",
        "self._before_merge[names[0]] = base.weight.data.clone()",
        "self._before_merge[names[0]] = merged",
        "tests/integrations/test_peft_lora.py -k undone",
    ),
    Mutation(
        "recovery of a model that was not pruned is refused",
        f"{ADAPTERS}/recovery_run.py",
        "            _check_pruned(found)",
        "            pass",
        "tests/integrations/test_recovery_run.py -k cannot_be_recovered",
    ),
    Mutation(
        "adapters start alike in every trainer",
        f"{ADAPTERS}/recovery_run.py",
        "torch.manual_seed(self.recipe.seed)",
        "pass",
        "tests/integrations/test_recovery_run.py -k both_trainers",
    ),
    Mutation(
        "after a distillation the loss is the ordinary one",
        f"{ADAPTERS}/hf_trainer.py",
        "calling_trainer()[0].compute_loss_func = None",
        "pass",
        "tests/integrations/test_recovery_run.py -k ordinary",
    ),
    Mutation(
        "existing zeros are held",
        f"{CORE}/sparsifier.py",
        "self._held.take_existing(allow_none=self.schedule.allow_dense)",
        "pass",
        "tests/test_existing_zeros.py -k zeros_stay",
    ),
    Mutation(
        "a resume with other steps goes on with the curve so far",
        f"{RECOVERY}/learning_rate.py",
        'self.curve = stretched(Curve.from_dict(state_dict["curve"]), self.options, step, end)',
        "self.curve = planned(self.options, end)",
        f"{RECOVERY_TESTS}/test_learning_rate.py",
    ),
    Mutation(
        "in evaluation a distillation's loss is the ordinary one",
        f"{RECOVERY}/distill.py",
        "if self._model.training and torch.is_grad_enabled():",
        "if True:",
        f"{RECOVERY_TESTS}/test_distill.py tests/integrations/test_distill_in_trainers.py",
    ),
    Mutation(
        "a teacher runs in its own dtype",
        f"{RECOVERY}/teacher.py",
        "torch.no_grad(), torch.autocast(device.type, enabled=False):",
        "torch.no_grad():",
        f"{RECOVERY_TESTS}/test_teacher.py",
    ),
    Mutation(
        "a refit leaves zeros zero",
        f"{CORE}/solvers/masked_least_squares.py",
        "(weight_OI + change_OI).masked_fill_(~mask_OI, 0)",
        "weight_OI + change_OI",
        "tests/solvers/test_masked_least_squares.py",
    ),
    Mutation(
        "a gap within its noise has no share",
        f"{RECOVERY}/gap.py",
        "if damage <= noise or damage == 0:",
        "if damage == 0:",
        f"{RECOVERY_TESTS}/test_gap.py",
    ),
)

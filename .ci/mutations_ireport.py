"""The mechanisms of the report of a conditioned training, for mutations.py."""

from mutation import Mutation

RECORD = "integrations/instruction/record.py"
RECORDED = "tests/integrations/instruction/test_record.py"
SECTIONS = "lightning_prune/report/condition.py"
PLOTS = "lightning_prune/report/condition_plots.py"
SHOWN = "tests/report/test_condition.py"
MUTATIONS = (
    Mutation(
        "a measurement takes the place of those that a resume repeats",
        RECORD,
        '*(one for one in self.measurements if one["step"] < step), entry',
        "*self.measurements, entry",
        f"{RECORDED} -k takes_the_place",
    ),
    Mutation(
        "parameters of units that are not kept do not count as activated",
        RECORD,
        "(group.num_units - k) * sum",
        "0 * sum",
        f"{RECORDED} -k activated",
    ),
    Mutation(
        "losses under all masks are of the same tokens",
        "lightning_prune/conditional/instruction.py",
        '{**batch, "labels": self.prompt(batch).labels}',
        "dict(batch)",
        f"{RECORDED} -k same_tokens",
    ),
    Mutation(
        "a model that cannot be served is no end of the training",
        RECORD,
        "except (ValueError, RuntimeError) as error:",
        "except KeyError as error:",
        f"{RECORDED} -k cannot_be_served",
    ),
    Mutation(
        "masks are measured at the end of the training too",
        "integrations/instruction/condition_run.py",
        "        if self._record.last_step != condition.step:",
        "        if False:",
        f"{RECORDED} -k report_of_a_training",
    ),
    Mutation(
        "what was measured is in the saved state",
        "integrations/instruction/condition_run.py",
        '        self._record.load_state_dict(state["record"])',
        "        pass",
        f"{RECORDED} -k resumed",
    ),
    Mutation(
        "instructions stand beside those that are alike",
        PLOTS,
        "    order = alike_first(between)",
        "    order = list(range(len(between)))",
        f"{SHOWN} -k most_alike",
    ),
    Mutation(
        "the last step is among those that are drawn",
        PLOTS,
        "found[::-1][::every][::-1]",
        "found[::every]",
        f"{SHOWN} -k dozen",
    ),
    Mutation(
        "sections without values are left out",
        SECTIONS,
        '    if not measurements:\n        return ""',
        '    if False:\n        return ""',
        f"{SHOWN} -k empty_sections",
    ),
    Mutation(
        "the page of a condition does not speak of sparsity",
        "lightning_prune/report/page.py",
        "has_sparsity=False",
        "has_sparsity=True",
        f"{SHOWN} -k not_pruned",
    ),
    Mutation(
        "tasks are written before they are looked for",
        "integrations/trainers/lightning_cli.py",
        "            self.datamodule.write_tasks()",
        "            pass",
        "tests/integrations/trainers/test_lightning_cli.py -k held_out_text",
    ),
)

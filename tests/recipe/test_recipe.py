"""Recipes: loading, overriding, writing, and what is said about a wrong one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_prune.allocations.global_rank import GlobalRank
from lightning_prune.allocations.uniform import Uniform
from lightning_prune.base import registry
from lightning_prune.conductor.guard import MetricGuard
from lightning_prune.conductor.sparsifier import Sparsifier
from lightning_prune.granularity import NM, Channel, Unstructured
from lightning_prune.recipe.recipe import Evaluate, Export, Prune, Recipe, ReportOptions, Shrink, packaged_recipes
from lightning_prune.schedules import Cubic, Linear, Once
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput
from lightning_prune.structured.depth.criteria import SequencePerplexity
from lightning_prune.structured.depth.methods import SLEB, ShortGPT
from lightning_prune.structured.depth.multipruner import MultiPruner
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.structured.width.method import Width
from lightning_prune.structured.width.unit_scores import Reduction
from lightning_prune.targets.targets import Targets
from tests.recipe_mutants import mutants

BASE = """
prune:
  scorer: {class_path: Wanda, init_args: {scope: tensor}}
  schedule: {class_path: Cubic, init_args: {sparsity: 0.5, start: 3, end: 0.75}}
"""
ONCE = "{class_path: Once, init_args: {sparsity: 0.5}}"
FULL = """
prune:
  targets: {include: ["*.q_proj.weight"], exclude: ["*.0.*"]}
  granularity: {class_path: NM, init_args: {n: 1, m: 4}}
  scorer: Magnitude
  allocation: Uniform
  schedule: {class_path: Once, init_args: {sparsity: 0.75, at: 0.5}}
  guard: {metric: val_loss, max: 4.5, action: rollback}
recover: null
evaluate: {tasks: [a, b], limit: 5, at: [end], every: 10}
export: {format: huggingface, dir: out}
report: {dir: page}
seed: 7
trainer: {max_steps: 5}
model: {class_path: my.Model, init_args: {lr: 1.0e-3}}
data: my.Data
"""


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a recipe into the test's folder."""

    def _write(text: str, name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def test_every_value_arrives_typed(write: Write) -> None:
    recipe = Recipe.load(write(FULL))
    assert recipe == Recipe(
        prune=Prune(
            targets=Targets(include=("*.q_proj.weight",), exclude=("*.0.*",)),
            granularity=NM(n=1, m=4),
            scorer=Magnitude(),
            allocation=Uniform(),
            schedule=Once(sparsity=0.75, at=0.5),
            guard=MetricGuard(metric="val_loss", max=4.5, action="rollback"),
        ),
        evaluate=Evaluate(tasks=("a", "b"), limit=5, at=("end",), every=10),
        export=Export(format="huggingface", dir="out"),
        report=ReportOptions(dir="page"),
        seed=7,
        trainer={"max_steps": 5},
        model={"class_path": "my.Model", "init_args": {"lr": 1e-3}},
        data="my.Data",
    )
    assert recipe.name == "job"


def test_what_is_left_out_has_its_default(write: Write) -> None:
    recipe = Recipe.load(write(BASE))
    assert recipe.prune.granularity == Unstructured()
    assert recipe.prune.allocation == Uniform()
    assert recipe.prune.targets == Targets()
    assert (recipe.prune.guard, recipe.evaluate, recipe.export, recipe.recover) == (None, None, None, None)
    assert recipe.report == ReportOptions(dir=None)
    assert (recipe.seed, recipe.trainer) == (0, None)


def test_steps_and_fractions_stay_what_they_are(write: Write) -> None:
    schedule = Recipe.load(write(BASE)).prune.schedule
    assert isinstance(schedule, Cubic)
    assert (schedule.start, type(schedule.start)) == (3, int)
    assert (schedule.end, type(schedule.end)) == (0.75, float)
    again = Recipe.load(write(BASE), overrides=["prune.schedule.start=0.0"]).prune.schedule
    assert isinstance(again, Cubic)
    assert type(again.start) is float


@pytest.mark.parametrize("text", [BASE, FULL])
def test_dump_and_load_give_equal_recipes(write: Write, text: str) -> None:
    recipe = Recipe.load(write(text))
    again = Recipe.load(write(recipe.dump(), "again.yaml"))
    assert again == recipe
    assert again.dump() == recipe.dump()


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_load_dump_and_build(write: Write, name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.load(write(recipe.dump())) == recipe
    if recipe.shrink is None or recipe.shrink.zeros:
        assert isinstance(recipe.sparsifier(), Sparsifier)
    else:
        assert isinstance(recipe.shrink.method, StructuredMethod)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_have_a_header(name: str) -> None:
    lines = packaged_recipes()[name].read_text(encoding="utf-8").splitlines()
    header = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    for word in ("Run:", "Needs:", "Source:", "Measured:"):
        assert word in header, f"{name} does not say {word}"
    assert name in header or "quickstart" in name


def test_every_scorer_has_a_recipe() -> None:
    recipes = [Recipe.load(name) for name in packaged_recipes()]
    used = {type(recipe.prune.scorer) for recipe in recipes if recipe.prune is not None}
    assert used == {entry.cls for entry in registry.entries("scorers")}


def test_sparsifier_gets_every_part(write: Write) -> None:
    recipe = Recipe.load(write(FULL))
    sparsifier = recipe.sparsifier()
    for part in ("schedule", "targets", "granularity", "scorer", "allocation", "guard"):
        assert getattr(sparsifier, part) == getattr(recipe.prune, part)
    assert sparsifier.seed == 7


def test_fingerprint_is_plain_and_changes_with_the_prune_section_only(write: Write) -> None:
    recipe = Recipe.load(write(FULL))
    print_of = recipe.fingerprint()
    assert print_of["schedule"] == {"class_path": "Once", "init_args": {"sparsity": 0.75, "at": 0.5}}
    assert print_of["targets"] == {"include": ["*.q_proj.weight"], "exclude": ["*.0.*"]}
    assert Recipe.load(recipe, overrides=["report.dir=elsewhere"]).fingerprint() == print_of
    assert Recipe.load(recipe, overrides=["prune.guard.max=4"]).fingerprint() != print_of


@pytest.mark.parametrize("dashes", ["", "--"])
def test_overrides_reach_into_classes(write: Write, dashes: str) -> None:
    changed = Recipe.load(
        write(BASE),
        overrides=[
            f"{dashes}prune.schedule.sparsity=0.75",
            f"{dashes}prune.schedule.init_args.end=0.5",
            f"{dashes}prune.granularity=NM",
            f"{dashes}prune.granularity.n=1",
            f"{dashes}seed=3",
            f"{dashes}evaluate.tasks=[x]",
            f"{dashes}trainer.max_steps=9",
        ],
    )
    assert changed.prune.schedule == Cubic(sparsity=0.75, start=3, end=0.5)
    assert changed.prune.granularity == NM(n=1, m=4)
    assert changed.seed == 3
    assert changed.evaluate == Evaluate(tasks=("x",))
    assert changed.trainer == {"max_steps": 9}


@pytest.mark.parametrize("key", ["prune.schedule", "prune.schedule.class_path"])
def test_another_class_keeps_no_option_of_the_one_before(write: Write, key: str) -> None:
    options = ["prune.schedule.sparsity=0.25", f"{key}=linear"]
    for overrides in (options, options[::-1]):
        assert Recipe.load(write(BASE), overrides=overrides).prune.schedule == Linear(sparsity=0.25)
    with pytest.raises(ValueError, match=r"prune.schedule.sparsity is missing; give a finite number"):
        Recipe.load(write(BASE), overrides=[f"{key}=Linear"])
    assert Recipe.load(write(BASE), overrides=["prune.scorer=Wanda"]).prune.scorer == Wanda(scope="row")


def test_an_option_alone_keeps_the_class(write: Write) -> None:
    assert Recipe.load(write(BASE), overrides=["prune.scorer.scope=row"]).prune.scorer == Wanda(scope="row")
    assert Recipe.load(write(BASE), overrides=["prune.schedule.start=5"]).prune.schedule == Cubic(
        sparsity=0.5, start=5, end=0.75
    )


@pytest.mark.parametrize("name", ["wanda", "Wanda", "WANDA"])
def test_a_class_goes_by_its_own_name_and_its_files_in_any_case(write: Write, name: str) -> None:
    assert Recipe.load(write(f"prune: {{scorer: {name}, schedule: {ONCE}}}")).prune.scorer == Wanda()
    assert Recipe.load(write(BASE), overrides=[f"prune.scorer={name}"]).prune.scorer == Wanda()
    for allocation in ("global_rank", "globalrank", "GlobalRank", "global-rank"):
        recipe = Recipe.load(write(BASE), overrides=[f"prune.allocation={allocation}"])
        assert recipe.prune.allocation == GlobalRank()
        assert recipe.as_dict()["prune"]["allocation"]["class_path"] == "GlobalRank"


def test_options_of_a_default_class_can_be_overridden(write: Write) -> None:
    text = "prune: {schedule: {class_path: Once, init_args: {sparsity: 0.5}}}"
    assert Recipe.load(write(text), overrides=["prune.scorer.scope=row"]).prune.scorer == Magnitude(scope="row")


def test_a_recipe_loads_as_itself_and_with_overrides() -> None:
    recipe = Recipe(prune=Prune(schedule=Once(sparsity=0.5), scorer=Wanda()), model={"a": [1]}, name="mine")
    assert Recipe.load(recipe) == recipe
    changed = Recipe.load(recipe, overrides=["prune.schedule.sparsity=0.25", "model.a=2"])
    assert changed.prune.schedule == Once(sparsity=0.25)
    assert recipe.model == {"a": [1]}, "overriding must not reach into the recipe it starts from"
    assert changed.name == "mine"


@dataclass(frozen=True, kw_only=True)
class Mine(Magnitude):
    """A scorer from outside the library."""

    power: float = 1.0


def test_classes_from_outside_the_library(write: Write) -> None:
    path = f"{__name__}.Mine"
    recipe = Recipe.load(write(BASE), overrides=[f"prune.scorer={path}", "prune.scorer.power=2.0"])
    assert recipe.prune.scorer == Mine(power=2.0)
    assert Recipe.load(write(recipe.dump())) == recipe


CUT = "shrink: {method: {class_path: ShortGPT, init_args: {num_blocks: 2}}}"
CHANNELS = BASE + "  granularity: Channel\nexport: {format: huggingface}\n"


def method(name: str, options: str) -> str:
    return f"shrink: {{method: {{class_path: {name}, init_args: {{{options}}}}}}}"


METHODS = [
    (method("ShortGPT", "num_blocks: 2"), ShortGPT(num_blocks=2)),
    (
        method("SLEB", "stop: {parameter_share: 0.3}, criterion: SequencePerplexity"),
        SLEB(stop=Stop(parameter_share=0.3), criterion=SequencePerplexity()),
    ),
    (
        method("Width", "sparsity: {ffn: 0.25, heads: 0.5}, scorer: {class_path: GreedyOutput, init_args: {batch: 4}}"),
        Width(sparsity={"ffn": 0.25, "heads": 0.5}, scorer=GreedyOutput(batch=4)),
    ),
    (
        method(
            "Width", "sparsity: {ffn: 0.25}, budget: {'a.mlp:ffn': 0.5}, reduction: {across: max}, compensate: none"
        ),
        Width(sparsity={"ffn": 0.25}, budget={"a.mlp:ffn": 0.5}, reduction=Reduction(across="max"), compensate="none"),
    ),
    (
        method("MultiPruner", "parameter_share: 0.25, split: [0.5, 0.5, 0], order: {'a.mlp:ffn': [1, 0]}"),
        MultiPruner(parameter_share=0.25, split=(0.5, 0.5, 0.0), order={"a.mlp:ffn": [1, 0]}),
    ),
]


@pytest.mark.parametrize(("text", "expected"), METHODS, ids=[type(expected).__name__ for _, expected in METHODS])
def test_structured_methods_arrive_typed_and_round_trip(write: Write, text: str, expected: StructuredMethod) -> None:
    recipe = Recipe.load(write(text))
    assert (recipe.prune, recipe.shrink) == (None, Shrink(method=expected))
    assert Recipe.load(write(recipe.dump())) == recipe
    with pytest.raises(ValueError, match="has no section prune and makes a model smaller at once"):
        recipe.sparsifier()


def test_overrides_reach_into_structured_methods(write: Write) -> None:
    text = method("Width", "sparsity: {ffn: 0.25}")
    overrides = ["shrink.method.sparsity.ffn=0.5", "shrink.method.scorer=GreedyOutput", "shrink.method.scorer.batch=2"]
    changed = Recipe.load(write(text), overrides=overrides).shrink
    assert changed == Shrink(method=Width(sparsity={"ffn": 0.5}, scorer=GreedyOutput(batch=2)))


def test_zeros_go_with_masks_on_channels(write: Write) -> None:
    recipe = Recipe.load(write(CHANNELS + "shrink: {zeros: true}"))
    assert recipe.shrink == Shrink(zeros=True)
    assert recipe.prune.granularity == Channel()
    assert Recipe.load(write(recipe.dump())) == recipe


BAD = [
    (CUT + BASE, "shrink.method makes a smaller model and nothing else; set prune: null"),
    (CUT + "\nevaluate: {tasks: [a]}", "set evaluate: null"),
    (CUT + "\nreport: {dir: x}", "report.dir has no effect with shrink.method"),
    (CUT + "\nexport: {format: dense}", "shrink changes shapes, which export.format dense does not record"),
    (BASE + "export: {format: per_layer}", "export.format per_layer is for blocks of different shapes"),
    (BASE + "shrink: {zeros: true}", "shrink.zeros cuts units that prune masks with granularity Channel"),
    ("shrink: {zeros: true}", "shrink.zeros cuts units that prune masks with granularity Channel"),
    ("shrink: {}", "shrink takes either a method, or zeros: true"),
    ("shrink: {zeros: true, method: {class_path: ShortGPT, init_args: {num_blocks: 2}}}", "got both"),
    ("shrink: {zero: true}", "unknown key 'shrink.zero'; did you mean 'shrink.zeros'?"),
    (
        method("ShortGTP", "num_blocks: 2"),
        "shrink.method: unknown structured method 'ShortGTP'; did you mean 'ShortGPT'?",
    ),
    (
        method("SLEB", "stop: {cuont: 2}"),
        "unknown key 'shrink.method.stop.cuont'; did you mean 'shrink.method.stop.count'?",
    ),
    (method("SLEB", "stop: {count: 1}, criterion: Loss"), "shrink.method.criterion: unknown criterion 'Loss'"),
    (
        method("Width", "sparsity: {fnn: 0.5}"),
        "unknown key 'shrink.method.sparsity.fnn'; did you mean 'shrink.method.sparsity.ffn'",
    ),
    (method("Width", "sparsity: {ffn: 1.0}"), "sparsity must be in [0, 1), got 1.0 for ffn"),
    (method("Width", "sparsity: {ffn: 0.5}, scorer: Wand"), "unknown scorer 'Wand'; did you mean 'Wanda'?"),
    ("sed: 1" + BASE, "unknown key 'sed'; did you mean 'seed'?"),
    ("prune: {scheduel: Once}", "unknown key 'prune.scheduel'; did you mean 'prune.schedule'?"),
    ("prune: {schedule: Onec}", "prune.schedule: unknown schedule 'Onec'; did you mean 'Once'?"),
    (
        "prune: {schedule: {class_path: Once, init_args: {sparsty: 0.5}}}",
        "unknown key 'prune.schedule.sparsty'; did you mean 'prune.schedule.sparsity'?",
    ),
    (
        "prune: {schedule: {class_paht: Once}}",
        "unknown key 'prune.schedule.class_paht'; did you mean 'prune.schedule.class_path'?",
    ),
    ("prune: {schedule: {init_args: {sparsity: 0.5}}}", "prune.schedule needs a class name"),
    ("prune: {schedule: {class_path: Once, init_args: {sparsity: 1.0}}}", "sparsity must be in [0, 1), got 1.0"),
    (
        "prune: {schedule: {class_path: Once, init_args: {sparsity: much}}}",
        "prune.schedule.sparsity must be a finite number, got 'much'",
    ),
    ("prune: {schedule: {class_path: no.such.Class}}", "no.such.Class"),
    ("prune: {schedule: Once}", "sparsity"),
    ("seed: 1", "the section prune is missing"),
    (BASE + "evaluate: {limit: 3}", "evaluate.tasks"),
    (BASE + "evaluate: {tasks: []}", "evaluate.tasks is empty"),
    (BASE + "evaluate: {tasks: [a], at: []}", "evaluate has neither at nor every"),
    (BASE + "evaluate: {tasks: [a], every: 0}", "evaluate.every must be 1 or more, got 0"),
    (BASE + "evaluate: {tasks: [a], at: [middle]}", "evaluate.at[0] must be one of start, end, got 'middle'"),
    (BASE + "evaluate: {tasks: [a], mask_from: task}", "there is no section condition"),
    (BASE + "evaluate: {tasks: [a], instruction: sum up}", "set evaluate.mask_from: task too"),
    (
        BASE + "export: {format: zip}",
        "export.format must be one of dense, huggingface, per_layer, adapter, conditional, got 'zip'",
    ),
    (BASE + "report: {dri: x}", "unknown key 'report.dri'; did you mean 'report.dir'?"),
    (BASE + "recover: {lora: {r: 8}}", "unknown key 'recover.lora.r'; did you mean 'recover.lora.form'?"),
    (BASE + "recover: {lora: {config: {r: 0}}}", "recover.lora.config.r must be 1 or more, got 0"),
    (BASE + "recover: {lora: {config: {r: 4.0}}}", "recover.lora.config.r must be a whole number, got 4.0"),
    (BASE + "recover: {lora: {config: {r: null}}}", "recover.lora.config.r must not be null"),
    (
        BASE + "recover: {lora: {config: {lora_alpha: .inf}}}",
        "recover.lora.config.lora_alpha must be a whole number or",
    ),
    (BASE + "recover: {lora: {config: {lora_alpha: 0}}}", "lora_alpha must be above 0, got 0"),
    (BASE + "recover: {lora: {config: {lora_dropout: 1.5}}}", "lora_dropout must be in [0, 1), got 1.5"),
    (BASE + "recover: {lora: {config: {target_modules: []}}}", "target_modules is empty"),
    (BASE + "recover: {lora: {config: {bias: some}}}", "recover.lora.config.bias must be one of none, all, lora_only"),
    (BASE + "recover: {distil: {}}", "unknown key 'recover.distil'; did you mean 'recover.distill'?"),
    (BASE + "recover: {distill: {loss: ForwardLK}}", "did you mean 'ForwardKL'?"),
    (BASE + "trainer: 5", "trainer must be a mapping, got 5"),
    (BASE + "data: [x]", "data must be a mapping, got ['x']"),
    (method("SLEB", "stop: {count: 0}"), "shrink.method.stop: count must be 1 or more, got 0"),
    (BASE + "seed: often", "seed must be a whole number, got 'often'"),
    ("prune: [1", "not a YAML file"),
    ("- 1", "a recipe is a mapping of sections, got [1]"),
    ("", "a recipe is a mapping of sections, got"),
    (
        "prune: {granularity: {class_path: NM, init_args: {n: 4, m: 4}}, "
        "schedule: {class_path: Once, init_args: {sparsity: 0.5}}}",
        "0 < n < m",
    ),
    (
        "prune: {granularity: NM, schedule: {class_path: Once, init_args: {sparsity: 0.6}}}",
        "2:4 means a final sparsity",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_a_wrong_recipe_gets_one_line_that_names_the_file(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ValueError) as caught:
        Recipe.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert "\n" not in said
    assert "NoneType" not in said or text == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.scheduler.sparsity=0.5", "unknown key 'prune.scheduler'; did you mean 'prune.schedule'?"),
        ("prune.granularity.m=8", "unknown key 'prune.granularity.m'; Unstructured takes no options"),
        ("prune.scorer=Wand", "unknown scorer 'Wand'; did you mean 'Wanda'?"),
        ("prune.schedule.sparsity", "an override is written section.key=value"),
        ("prune.targets.include=[*.x]", "is not YAML"),
        ("prune.schedule.sparsity=2", "sparsity must be in [0, 1), got 2"),
    ],
)
def test_a_wrong_override_is_named(write: Write, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.load(write(BASE), overrides=[override])
    assert message in str(caught.value)
    assert override in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "allocation: null",
            "prune.allocation must not be null; leave it out, or give a class name",
        ),
        ("targets: {include: null}", "prune.targets.include must not be null"),
        (
            "targets: {include: '*.weight'}",
            "prune.targets.include must be a list (text, not empty each)",
        ),
        ("guard: {metric: '', max: 1.0}", "prune.guard.metric must be text, not empty, got ''"),
        ("guard: {metric: x, max: .nan}", "prune.guard.max must be a finite number, got nan"),
        ("guard: {metric: x, max: .inf}", "prune.guard.max must be a finite number, got inf"),
        ("guard: {metric: x, max: true}", "prune.guard.max must be a finite number, got True"),
        ("granularity: {class_path: NM, init_args: {n: 2.0}}", "prune.granularity.n must be a whole number, got 2.0"),
        ("scorer: {class_path: Wanda, init_args: []}", "prune.scorer: the options of Wanda must be a mapping, got []"),
        ("scorer: {class_path: os.system}", "prune.scorer: 'os.system' is no class that derives from Scorer"),
        ("scorer: {class_path: lightning_prune.base.types.Scorer}", "is no class that derives from Scorer"),
        ("scorer: {class_path: Existing}", "prune.scorer: unknown scorer 'Existing'"),
        ("3: 4", "unknown key 'prune.3'"),
    ],
)
def test_what_cannot_stand_at_a_place_is_named_with_what_can(write: Write, change: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Recipe.load(write(f"prune:\n  schedule: {ONCE}\n  {change}\n"))
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["null", "true", "-1", "4294967296", "1.0", "'1'", f"1{'0' * 5000}"])
def test_a_seed_is_a_number_that_every_generator_takes(write: Write, value: str) -> None:
    with pytest.raises(ValueError, match=r"seed|digits"):
        Recipe.load(write(f"{BASE}seed: {value}\n"))


@pytest.mark.parametrize("interval", ["1e30", "-5", "0", "true", ".nan", "-0.1", f"{10**13}"])
def test_an_interval_is_a_step_or_a_fraction(write: Write, interval: str) -> None:
    with pytest.raises(ValueError, match="interval"):
        Recipe.load(write(BASE), overrides=[f"prune.schedule.interval={interval}"])


def test_null_stays_where_nothing_is_a_choice(write: Write) -> None:
    text = FULL.replace("{metric: val_loss, max: 4.5, action: rollback}", "null")
    recipe = Recipe.load(write(text), overrides=["evaluate=null", "export=null", "report=null", "report.dir=null"])
    assert (recipe.prune.guard, recipe.evaluate, recipe.export, recipe.report) == (None, None, None, ReportOptions())


NINES = "\n".join([f"a0: &a0 [{'x, ' * 9}]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 9))])
BAD_FILES = [
    (b"seed: 1\nseed: 2\n", "the key 'seed' stands twice in one mapping; keep one in line 2"),
    (b"prune: {schedule: {class_path: Once, init_args: {sparsity: 0.5, sparsity: 0.9}}}", "the key 'sparsity' stands"),
    (NINES.encode(), "more than 50000 values once its aliases are unfolded"),
    (b"a: &a [*a]", "the alias 'a' stands inside what it stands for"),
    (b"[" * 100_000, "nested more than 40 levels deep"),
    (b"a: " + b"{b: " * 100, "nested more than 40 levels deep"),
    (b"x: '" + b"y" * 1_000_000 + b"'", "over 1,000,000 bytes, which is no recipe"),
    (b"prune:\n\tschedule: Once\n", "cannot start any token in line 2"),
    (b"\x89PNG\r\n\x1a\n", "byte 0 is not UTF-8 text"),
    (b"a: \x00", "special characters are not allowed"),
    (b'seed: "\\ud800"', "text with a character that cannot be written"),
    (b"seed: 1\n---\nseed: 2\n", "found another document in line 2"),
    (b"seed: !!python/object/apply:os.system ['exit 3']", "the tag 'tag:yaml.org,2002:python/object/apply"),
    (b"seed: !!int x", "'x' is no int"),
    (b"? [a]\n: 1", "a key must be a word in line 1"),
    (b"seed: *nothing", "found undefined alias"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES, ids=[message for _, message in BAD_FILES])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Recipe.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: not a YAML file: ") or "which is no recipe" in said
    assert message in said
    assert "\n" not in said
    assert len(said) < 400


def test_marks_anchors_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    text = (
        "x: &base {sparsity: 0.5, start: 0}\nprune: {schedule: {class_path: Cubic, init_args: {<<: *base, start: 3}}}"
    )
    path.write_text(text.replace("x: ", "data: "), encoding="utf-8-sig")
    assert Recipe.load(path).prune.schedule == Cubic(sparsity=0.5, start=3)


@pytest.mark.parametrize(
    "text", ["1e3", "010", "1:30", "2026-01-01", "null", "yes", "=", "<<", "0x1F", "a\nb", "x\x85y"]
)
def test_text_that_looks_like_something_else_is_written_so_that_it_stays_text(write: Write, text: str) -> None:
    recipe = Recipe(prune=Prune(schedule=Once(sparsity=0.5)), report=ReportOptions(dir=text))
    assert Recipe.load(write(recipe.dump())) == recipe


def test_a_file_that_is_not_there_or_not_readable_is_said(tmp_path: Path) -> None:
    (tmp_path / "link.yaml").symlink_to(tmp_path / "gone.yaml")
    for name, message in {
        str(tmp_path / "no.yaml"): "no.yaml: no such file; a recipe is a YAML file or a packaged name",
        str(tmp_path / "link.yaml"): "link.yaml: no such file",
        "./wanda_half": "wanda_half: no such file",
        str(tmp_path): "is a folder; a recipe is a YAML file",
        "/dev/null": "is no regular file",
        "~nosuchuser/x.yaml": "cannot be opened: Could not determine home directory",
        "x" * 5000: "cannot be opened: File name too long",
        "a\0b": "unknown recipe",
    }.items():
        with pytest.raises(ValueError) as caught:
            Recipe.load(name)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 400


def test_random_mutants_load_and_write_back_equal_or_are_refused_in_one_line(tmp_path: Path) -> None:
    path, again = tmp_path / "job.yaml", tmp_path / "again.yaml"
    num_refused = 0
    for mutant in mutants(list(packaged_recipes().values()), 200, seed=17):
        text = mutant.text
        path.write_text(text, encoding="utf-8")
        try:
            recipe = Recipe.load(path)
        except ValueError as error:
            said = str(error)
            assert said.startswith(f"{path}: "), text
            assert "\n" not in said, text
            assert len(said) < 400, text
            assert "functools" not in said, text
            assert "<class" not in said, text
            assert not mutant.keys or any(key in said.removeprefix(str(path)) for key in mutant.keys), (said, text)
            num_refused += 1
            continue
        again.write_text(recipe.dump(), encoding="utf-8")
        assert Recipe.load(again) == recipe, text
    assert 100 < num_refused < 190  # neither is everything refused nor everything taken


def test_unknown_recipe_gives_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'oneshot/wanda_hlf'; did you mean 'oneshot/wanda_half'\?"):
        Recipe.load("oneshot/wanda_hlf")

"""Recipes: loading, overriding, writing, and what is said about a wrong one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_prune import registry
from lightning_prune.allocations.uniform import Uniform
from lightning_prune.granularity import NM, Channel, Unstructured
from lightning_prune.guard import MetricGuard
from lightning_prune.recipe import Evaluate, Export, Prune, Recipe, ReportOptions, Shrink, packaged_recipes
from lightning_prune.schedules import Cubic, Linear, Once
from lightning_prune.scorers.magnitude import Magnitude
from lightning_prune.scorers.wanda import Wanda
from lightning_prune.solvers.greedy_output import GreedyOutput
from lightning_prune.sparsifier import Sparsifier
from lightning_prune.structured.depth.criteria import SequencePerplexity
from lightning_prune.structured.depth.methods import SLEB, ShortGPT
from lightning_prune.structured.depth.multipruner import MultiPruner
from lightning_prune.structured.depth.search import Stop
from lightning_prune.structured.method import StructuredMethod
from lightning_prune.structured.width.method import Width
from lightning_prune.structured.width.unit_scores import Reduction
from lightning_prune.targets import Targets

BASE = """
prune:
  scorer: {class_path: Wanda, init_args: {scope: tensor}}
  schedule: {class_path: Cubic, init_args: {sparsity: 0.5, start: 3, end: 0.75}}
"""
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


def test_another_class_takes_over_shared_options(write: Write) -> None:
    linear = Recipe.load(write(BASE), overrides=["prune.schedule=Linear"]).prune.schedule
    assert linear == Linear(sparsity=0.5, start=3, end=0.75)
    once = Recipe.load(write(BASE), overrides=["prune.schedule=Once"]).prune.schedule
    assert once == Once(sparsity=0.5)


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
    (method("Width", "sparsity: {fnn: 0.5}"), "unknown kind of unit 'fnn'; did you mean 'ffn'?"),
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
    ("prune: {schedule: {class_path: Once, init_args: {sparsity: much}}}", "Got value: much"),
    ("prune: {schedule: {class_path: no.such.Class}}", "no.such.Class"),
    ("prune: {schedule: Once}", "sparsity"),
    ("seed: 1", "the section prune is missing"),
    (BASE + "evaluate: {limit: 3}", "evaluate.tasks"),
    (BASE + "evaluate: {tasks: []}", "evaluate.tasks is empty"),
    (BASE + "evaluate: {tasks: [a], at: []}", "evaluate has neither at nor every"),
    (BASE + "evaluate: {tasks: [a], every: 0}", "evaluate.every must be 1 or more, got 0"),
    (BASE + "evaluate: {tasks: [a], at: [middle]}", "Got value: middle"),
    (BASE + "export: {format: zip}", "Got value: zip"),
    (BASE + "report: {dri: x}", "unknown key 'report.dri'; did you mean 'report.dir'?"),
    (BASE + "recover: {lora: {r: 8}}", "unknown key 'recover.lora.r'; did you mean 'recover.lora.form'?"),
    (BASE + "recover: {distil: {}}", "unknown key 'recover.distil'; did you mean 'recover.distill'?"),
    (BASE + "recover: {distill: {loss: ForwardLK}}", "did you mean 'ForwardKL'?"),
    (BASE + "seed: often", "Got value: often"),
    ("prune: [1", "not a YAML file"),
    ("- 1", "a recipe is a mapping of sections, got list"),
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


def test_unknown_recipe_gives_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'oneshot/wanda_hlf'; did you mean 'oneshot/wanda_half'\?"):
        Recipe.load("oneshot/wanda_hlf")

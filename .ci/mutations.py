"""Remove one mechanism at a time and check that a test notices.

Run:  python .ci/mutations.py [WORD ...]    (only the mutations whose promise contains a word)
Each entry names the promise, the file, the code that keeps it, its replacement, and the tests that must then fail.
The entries of single rooms stand in `mutations_<room>.py` beside this file, each as its MUTATIONS.
The files are put back afterwards, also after an interruption.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import Mutation

ROOT = Path(__file__).resolve().parents[1]


SPARSIFIER, HF = "tests/conductor/test_sparsifier.py", "tests/integrations/trainers/test_hf_trainer.py"
LIGHTNING = "tests/integrations/trainers/test_lightning_trainer.py"
CORE, ADAPTERS = "lightning_prune", "integrations"
STRUCTURED, STRUCTURED_TESTS = "lightning_prune/structured", "tests/structured"
MUTATIONS = (
    Mutation(
        "gradients of pruned weights are zeroed before clipping",
        "lightning_prune/calibration/hooks.py",
        "distributed.local(parameter.grad).mul_(mask.view(torch.uint8))",
        "pass",
        f"{SPARSIFIER} -k gradients_of_pruned",
    ),
    Mutation(
        "zeros survive optimizers that write them",
        "lightning_prune/conductor/held_masks.py",
        ".mul_(self.masks[binding.name].view(torch.uint8)).add_(0.0)",
        "",
        f"{SPARSIFIER} -k survive",
    ),
    Mutation(
        "zeros are positive",
        "lightning_prune/conductor/held_masks.py",
        ".add_(0.0)",
        "",
        f"{SPARSIFIER} -k survive",
    ),
    Mutation(
        "optimizers forget what is pruned",
        "lightning_prune/calibration/hooks.py",
        "part.masked_fill_(changed, 0)",
        "pass",
        f"{SPARSIFIER} -k forgets",
    ),
    Mutation(
        "pruned weights stay pruned",
        "lightning_prune/conductor/decision.py",
        "if name in self.held and not self.scorer.dense_grad:",
        "if False:",
        f"{SPARSIFIER} -k stays_pruned",
    ),
    Mutation(
        "a step the scaler skips does not count",
        "lightning_prune/conductor/optimizer_steps.py",
        "return found is not None and bool(found.item())",
        "return False",
        f"{SPARSIFIER} -k scaler_skips",
    ),
    Mutation(
        "the clock counts optimizer steps, not batches",
        "integrations/trainers/lightning_trainer.py",
        "self.run.after_step()\n",
        "self.run.sparsifier._progress.step += 1\n        self.run.after_step()\n",
        f"{LIGHTNING} -k accumulation",
    ),
    Mutation(
        "resume restores masks",
        "lightning_prune/conductor/progress.py",
        'held.masks.update(saved_state.unpack_masks(state["masks"], held.bindings))',
        "pass",
        "tests/test_resume.py",
    ),
    Mutation(
        "resume restores statistics",
        "lightning_prune/conductor/progress.py",
        'saved_state.restore_statistics(state["statistics"], observation.statistics, held.bindings)',
        "pass",
        "tests/test_resume.py",
    ),
    Mutation(
        "resume restores the clock",
        "lightning_prune/conductor/progress.py",
        'step=int(state["step"]),',
        "",
        "tests/test_resume.py",
    ),
    Mutation(
        "resume restores the guard",
        "lightning_prune/conductor/progress.py",
        'memory=saved_state.unpack_guard(state["guard"], held.bindings),',
        "",
        "tests/test_guarded_training.py",
    ),
    Mutation(
        "a resume finds a moved checkpoint folder",
        "integrations/trainers/hf_trainer.py",
        "folder = Path(resumed_from or _checkpoint_folder(trainer))",
        "folder = _checkpoint_folder(trainer)",
        f"{HF} -k moved",
    ),
    Mutation(
        "a side file is never unpickled",
        "lightning_prune/conductor/saved_state.py",
        "weights_only=True",
        "weights_only=False",
        f"{HF} -k foreign",
    ),
    Mutation(
        "tampered masks are refused",
        "lightning_prune/conductor/sparsifier.py",
        "saved_state.check_digest(state)",
        "pass",
        "tests/test_resume.py",
    ),
    Mutation(
        "a resume with another recipe is refused",
        "lightning_prune/conductor/sparsifier.py",
        'saved_state.check_recipe(state["settings"], self.settings())',
        "pass",
        "tests/test_resume.py",
    ),
    Mutation(
        "a promised sparsity that is not reached is said aloud",
        "lightning_prune/conductor/closing_notes.py",
        "yield _short(ending)\n",
        "pass\n",
        f"{SPARSIFIER} -k said_aloud",
    ),
    Mutation(
        "weights replaced by a best checkpoint are noticed",
        "lightning_prune/conductor/closing_notes.py",
        "if ending.differences:",
        "if False:",
        f"{HF} -k were_replaced",
    ),
    Mutation(
        "the guard holds",
        "lightning_prune/conductor/sparsifier.py",
        "if self._progress.is_once or self._progress.memory.is_held:",
        "if self._progress.is_once:",
        "tests/test_guarded_training.py",
    ),
    Mutation(
        "the guard goes back",
        "lightning_prune/conductor/guarding.py",
        "held.go_back(good)",
        "pass",
        "tests/test_guarded_training.py",
    ),
    Mutation(
        "a pattern without a match is an error",
        "lightning_prune/targets/targets.py",
        "if not any(fnmatchcase(name, pattern) for name in names):",
        "if False:",
        "tests/targets/test_targets.py",
    ),
    Mutation(
        "copies of a model do not feed its statistics",
        "lightning_prune/calibration/hooks.py",
        "if in_backward() or module is not self.module:",
        "if in_backward():",
        "tests/calibration/test_hooks.py",
    ),
    Mutation(
        "recomputed activations are not counted twice",
        "lightning_prune/calibration/hooks.py",
        "if in_backward() or module is not self.module:",
        "if module is not self.module:",
        "tests/calibration/test_hooks.py",
    ),
    Mutation(
        "ranks check that they hold the same masks",
        "lightning_prune/conductor/held_masks.py",
        "distributed.check_same_everywhere(torch.stack(hashes), [b.name for b in held])",
        "pass",
        "tests/base/test_distributed.py",
    ),
    Mutation(
        "FSDP1 is refused",
        "lightning_prune/base/distributed.py",
        "if isinstance(module, FullyShardedDataParallel):",
        "if False:",
        "tests/base/test_distributed.py",
    ),
    Mutation(
        "shards agree on one cut",
        "lightning_prune/conductor/decision.py",
        "return values if self._is_whole(binding) else distributed.all_reduce_sum(values, binding.parameter)",
        "return values",
        "tests/base/test_distributed.py",
    ),
    Mutation(
        "exec fails when nothing was pruned",
        "integrations/programs/exec_inject.py",
        "return EXIT_NOT_PRUNED",
        "return 0",
        "tests/integrations/programs/test_exec_inject.py",
    ),
    Mutation(
        "wrong orders of units are found out",
        f"{STRUCTURED}/discovery/discover.py",
        "if not gap <= TOLERANCE:",
        "if False:",
        f"{STRUCTURED_TESTS}/discovery/test_discover.py -k order",
    ),
    Mutation(
        "a probe that sees nothing proves nothing",
        f"{STRUCTURED}/discovery/discover.py",
        "if inputs is self.probes[0] and torch.equal(expected, self.intact):",
        "if False:",
        f"{STRUCTURED_TESTS}/discovery/test_discover.py -k sees_nothing",
    ),
    Mutation(
        "the smaller model is compared with the masked one",
        f"{STRUCTURED}/shrink.py",
        "if not gap <= tolerance(tensor):",
        "if False:",
        f"{STRUCTURED_TESTS}/test_shrink.py -k noticed",
    ),
    Mutation(
        "norms over fewer channels are made up for",
        f"{STRUCTURED}/cutting.py",
        "if member.power and",
        "if False and",
        f"{STRUCTURED_TESTS}/discovery/test_discover.py -k every_kind",
    ),
    Mutation(
        "the head size is pinned when heads or channels go",
        f"{STRUCTURED}/build.py",
        'edits |= {tuple(name.split(".")): value for name, value in group.pins.items()}',
        "pass",
        f"{STRUCTURED_TESTS}/test_shrink.py -k key_value",
    ),
    Mutation(
        "query heads stay even",
        f"{STRUCTURED}/groups.py",
        "if counts.unique().numel() > 1:",
        "if False:",
        f"{STRUCTURED_TESTS}/test_groups.py",
    ),
    Mutation(
        "removed experts get no tokens",
        f"{STRUCTURED}/discovery/expert_mask.py",
        "return output.index_fill(-1, self.removed[own[0]], -torch.inf)",
        "return output",
        f"{STRUCTURED_TESTS}/discovery/test_discover.py -k experts",
    ),
    Mutation(
        "optimizers follow a cut",
        f"{STRUCTURED}/in_place.py",
        'group["params"] = kept',
        "pass",
        f"{STRUCTURED_TESTS}/test_in_place.py -k goes_on",
    ),
    Mutation(
        "moments are cut like their weights",
        f"{STRUCTURED}/in_place.py",
        "optimizer.state[new] = {",
        "_ = {",
        f"{STRUCTURED_TESTS}/test_in_place.py -k goes_on",
    ),
    Mutation(
        "ranks stay together after a cut",
        f"{STRUCTURED}/in_place.py",
        "distributed.rebuild(wrapper)",
        "pass",
        f"{STRUCTURED_TESTS}/test_in_place.py -k ranks",
    ),
    Mutation(
        "checkpoints remember what they were cut from",
        f"{STRUCTURED}/gradual.py",
        "config.cut_from = first",
        "pass",
        f"{STRUCTURED_TESTS}/test_gradual.py -k remembers",
    ),
    Mutation(
        "a full-size module takes a smaller checkpoint",
        "integrations/trainers/lightning_gradual_shrink.py",
        "fit_to_shapes(self.model, shapes, self.kind)",
        "pass",
        "tests/integrations/test_gradual_shrink.py -k lightning",
    ),
)


def all_mutations() -> list[Mutation]:
    """Return the entries here and of all rooms."""
    rooms = sorted(path.stem for path in Path(__file__).parent.glob("mutations_*.py"))
    return [*MUTATIONS, *(entry for room in rooms for entry in importlib.import_module(room).MUTATIONS)]


def survives(mutation: Mutation) -> bool:
    """Return whether the tests pass although the mechanism is gone."""
    path = ROOT / mutation.file
    original = path.read_text(encoding="utf-8")
    if mutation.code not in original:
        raise SystemExit(f"{mutation.file} no longer contains {mutation.code!r}; bring the list up to date")
    try:
        path.write_text(original.replace(mutation.code, mutation.replacement), encoding="utf-8")
        options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not network")
        command = [sys.executable, "-m", "pytest", *options, *mutation.tests.split()]
        code = subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise SystemExit(f"no test is chosen by {mutation.tests!r}; bring the list up to date")
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit(f"{mutation.tests!r} could not run (pytest ends with {code}); mend {mutation.promise!r}")
        return code == pytest.ExitCode.OK
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> int:
    """Try every mutation and return how many survived."""
    words = sys.argv[1:]
    chosen = [m for m in all_mutations() if not words or any(word in m.promise for word in words)]
    num_survived = 0
    for mutation in chosen:
        survived = survives(mutation)
        num_survived += survived
        print(f"{'SURVIVED' if survived else 'noticed':9} {mutation.promise}", flush=True)
    print(f"{len(chosen) - num_survived} noticed, {num_survived} survived")
    return num_survived


if __name__ == "__main__":
    sys.exit(main())

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.conditional.instruction import Instruction, InstructionCondition
from lightning_prune.integrations.instruction.serving import InstructionModel
from lightning_prune.predictors.budget import Budget
from lightning_prune.predictors.prompt import Reads
from lightning_prune.structured.structure import Stack
from tests.model_folders import character_tokenizer
from tests.tiny_models import tiny_llama

ROWS = 2 * 3 * 24 * 32 * 4  # bytes of the gathered tensors of one sub-model
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def conditioned(**options: Any) -> InstructionCondition:
    torch.manual_seed(0)
    options = {"budget": Budget(keep=0.5), **options}
    condition = Instruction(**options).insert(tiny_llama().eval(), Stack((), "num_hidden_layers", (), 2))
    nn.init.normal_(condition.predictor.head.outer.bias)
    condition.predictor.head.outer.weight.data.mul_(20)  # instructions that differ get other units
    condition.predictor.num_steps.fill_(7)
    return condition


def served(**options: Any) -> InstructionModel:
    limits = {"cache_bytes": options.pop("cache_bytes")} if "cache_bytes" in options else {}
    return InstructionModel(conditioned(**options), character_tokenizer(), **limits)


def ids_of(text: str) -> Tensor:
    ids: Tensor = character_tokenizer()(text, return_tensors="pt")["input_ids"]
    return ids


def test_a_selected_model_computes_what_the_parent_does_for_its_instruction() -> None:
    model = served()
    for text in ("sum: ", "a story about dogs"):
        small = model.select(text)
        assert type(small) is type(model.model)
        assert small.config.intermediate_size == 24
        torch.testing.assert_close(small(ids_of(text)).logits, model.model(ids_of(text)).logits, rtol=0, atol=1e-5)
    assert model.select("sum: ") is not small
    assert model.select("a story about dogs") is small
    assert model.select(ids_of("a story about dogs")) is small


def test_each_prompt_is_continued_as_the_masked_parent_does() -> None:
    model = served()
    texts = ["abc", "the quick brown fox", "12 + 3 = ", "abc", "zz"]
    found = model.generate(texts, batch_size=2, **GREEDY)
    tokenizer = character_tokenizer()
    for text, continued in zip(texts, found, strict=True):
        ids = ids_of(text)
        expected = model.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **GREEDY)
        assert continued == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_prompts_with_one_mask_share_one_model_and_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served(reads=Reads(max_tokens=4))
    calls: list[int] = []
    plain = model._continued

    def counted(small: Any, tokens: Any, options: Any) -> list[str]:
        calls.append(len(tokens))
        return plain(small, tokens, options)

    monkeypatch.setattr(model, "_continued", counted)
    texts = ["sum: 1 + 1", "a story", "sum: 2 + 5 + 9", "sum: 4"]
    found = model.generate(texts, **GREEDY)
    assert sorted(calls) == [1, 3]
    assert len(model.cache) == 2
    assert found == [model.generate([text], **GREEDY)[0] for text in texts]


def test_models_are_gathered_once_and_the_oldest_goes_when_the_budget_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model = served(cache_bytes=2 * ROWS)
    gathered = 0
    plain = model.sub_models.gather

    def counted(*args: Any, **kwargs: Any) -> nn.Module:
        nonlocal gathered
        gathered += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(model.sub_models, "gather", counted)
    for text in ("abc", "def", "abc", "ghi", "abc"):
        model.select(text)
    assert gathered == 3
    assert model.cache.num_bytes == 2 * ROWS
    model.select("def")
    assert gathered == 4
    small = served(cache_bytes=ROWS - 1)
    small.select("abc")
    assert len(small.cache) == 0


def test_weights_that_change_are_gathered_anew() -> None:
    model = served()
    first = model.select("abc")
    with torch.no_grad():
        model.condition.predictor.head.outer.bias.neg_()
    second = model.select("abc")
    assert second is not first
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    torch.testing.assert_close(
        model.select("abc")(ids_of("abc")).logits, model.model(ids_of("abc")).logits, rtol=0, atol=1e-5
    )


def test_a_cache_of_another_sub_model_is_refused() -> None:
    model = served()
    first, second = model.select("abc"), model.select("def")
    ids = ids_of("abc")
    cache = first(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="under another instruction"):
        second(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="belongs to another mask"):
        model.model(ids[:, :1], past_key_values=cache)
    with model.condition.whole():
        other = model.model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="under another instruction"):
        first(ids[:, :1], past_key_values=other)
    model.cache.clear()
    again = model.select("abc")  # gathered anew, and the same
    whole = again(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1]
    torch.testing.assert_close(again(ids[:, :1], past_key_values=cache).logits[:, -1], whole, rtol=0, atol=1e-5)


def test_a_named_task_serves_all_its_inputs_with_one_model(tmp_path: Path) -> None:
    model = served()
    model.add_task("sums", "add the numbers: ")
    small = model.select(task="sums")
    assert small is model.select("add the numbers: ")  # equal masks
    expected = model.generate(["1 + 1", "2 + 2"], task="sums", **GREEDY)
    again = InstructionModel.from_pretrained(model.save_pretrained(tmp_path / "model"), device="cpu")
    torch.testing.assert_close(again.select(task="sums")(ids_of("1")).logits, small(ids_of("1")).logits)
    assert again.generate(["1 + 1", "2 + 2"], task="sums", **GREEDY) == expected
    assert len(again.cache) == 1
    with pytest.raises(ValueError, match="unknown task 'sum'; did you mean 'sums'"):
        again.select(task="sum")


def test_a_share_is_chosen_within_the_range_of_the_training() -> None:
    model = served(budget=Budget(keep=0.75, keep_from=0.25))
    assert model.select("abc").config.intermediate_size == 32
    small = model.select("abc", keep=0.35)
    assert small.config.intermediate_size == 16
    with model.condition.fixed(model.condition.masks_of(prompt_of(model, "abc"), [16, 16])):
        expected = model.model(ids_of("abc")).logits
    torch.testing.assert_close(small(ids_of("abc")).logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"in the range that this model was trained over, 0.25 to 0.75, got 0.9"):
        model.select("abc", keep=0.9)
    with pytest.raises(ValueError, match=r"this model has one budget, 0.5"):
        served().select("abc", keep=0.5)


def prompt_of(model: InstructionModel, text: str) -> Any:
    ids = ids_of(text)
    return model.condition.prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_memory_is_the_parent_once_and_the_gathered_rows() -> None:
    model = served()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.model.state_dict().values()}
    smalls = [model.select(text) for text in ("abc", "def", "ghi")]
    tensors = [tensor for small in smalls for tensor in (*small.parameters(), *small.buffers())]
    added = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    shared_buffers = {buffer.untyped_storage().data_ptr() for buffer in smalls[0].buffers()}
    assert shared_buffers == {buffer.untyped_storage().data_ptr() for buffer in smalls[2].buffers()}
    extra = sum(size for place, size in added.items() if place not in own | shared_buffers)
    assert extra == model.cache.num_bytes == 3 * ROWS


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.select(""), "the prompt is empty"),
        (lambda model: model.select(["abc", "def"]), "one sub-model serves one instruction, got 2 prompts"),
        (lambda model: model.select(), "either a prompt or the name of a task"),
        (lambda model: model.select("abc", task="sums"), "either a prompt or the name of a task"),
        (lambda model: model.select(task="sums"), "no task 'sums', nor any other"),
        (lambda model: model.generate("abc"), "takes a list of prompts"),
        (lambda model: model.generate(["abc", " "]), "the prompt is empty"),
        (lambda model: model.add_task("", "abc"), "needs a name"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(served())


def test_select_before_training_is_refused() -> None:
    condition = conditioned()
    condition.predictor.num_steps.zero_()
    condition.predictor.head.outer.bias.data.zero_()
    model = InstructionModel(condition, character_tokenizer())
    with pytest.raises(ValueError, match="the predictor of this model was not trained"):
        model.select("abc")
    condition.predictor.head.outer.bias.data.normal_()  # as the start from importance leaves it
    model.select("abc")

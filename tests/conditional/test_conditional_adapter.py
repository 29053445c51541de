import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from lightning_prune.conditional.conditional_adapter import ConditionalAdapter
from tests.conditional.routed_models import METHODS, inserted, logits, routers_of, stack_of, trained
from tests.tiny_models import STACKS_EXPERTS, tiny_family, token_windows

METHOD = METHODS["conditional_adapter"]


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "adapter")]


def count_rows(module: nn.Module, counted: list[int]) -> None:
    module.register_forward_hook(lambda _, args, output: counted.append(args[0].shape[:-1].numel()))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_reduction_of_one_is_the_parallel_adapter(family: str) -> None:
    model, condition = inserted(family, ConditionalAdapter(reduction=1, adapter_width=4))
    for block in blocks(model):
        nn.init.normal_(block.adapter.up.weight)
    condition.begin(total_steps=2)
    condition.after_step()
    plain, ids = tiny_family(family).eval(), token_windows(2, 10)
    parts = [block for block in plain.modules() if type(block) is type(blocks(model)[0])]
    for part, block in zip(parts, blocks(model), strict=True):
        part.register_forward_hook(
            lambda _, args, output, adapter=block.adapter: (
                (output[0] + adapter(args[0]), *output[1:]) if isinstance(output, tuple) else output + adapter(args[0])
            )
        )
    found = logits(model, ids)
    assert not torch.allclose(found, logits(tiny_family(family).eval(), ids), atol=1e-2)
    torch.testing.assert_close(found, logits(plain, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_left_out_changes_nothing_beside_a_dense_block_that_is_mixed(family: str) -> None:
    model, ids = trained(family, METHOD), token_windows(3, 14, seed=3)
    block, seen = blocks(model)[0], []
    block.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True)
    logits(model, ids, use_cache=False) if family != "bert" else logits(model, ids)
    ((args, kwargs, output),) = seen
    x_BTD: Tensor = args[0]
    with torch.no_grad():
        chosen_BT, scale_BT = block.token_router(x_BTD, None)
        is_open = torch.ones(14, 14, dtype=torch.bool) if family == "bert" else torch.ones(14, 14).tril().bool()
        is_open = is_open & chosen_BT[:, None, None, :] | torch.eye(14, dtype=torch.bool)
        mask = torch.zeros(3, 1, 14, 14).masked_fill(~is_open, -1e9)
        names = list(block.forward.__signature__.parameters)
        given = dict(zip(names, args, strict=False)) | kwargs | {"attention_mask": mask}
        dense = type(block).forward(block, **given)
        dense_BTD = dense[0] if isinstance(dense, tuple) else dense
        expected = x_BTD + block.adapter(x_BTD) + scale_BT[..., None] * (dense_BTD - x_BTD)
    assert 0 < int(chosen_BT.sum()) < chosen_BT.numel()
    found = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_chosen_tokens_are_computed() -> None:
    model, ids = trained("bert", METHOD), token_windows(3, 14)
    counted: list[int] = []
    count_rows(model.bert.encoder.layer[0].intermediate.dense, counted)
    logits(model, ids)
    assert counted == [3 * 6]  # ceil(14 / 2.5) of every sequence


def test_a_block_that_no_token_enters_is_not_run_and_keeps_its_place_in_the_cache() -> None:
    model = trained("llama", METHOD)
    ids, counted = token_windows(2, 8), list[int]()
    count_rows(model.model.layers[1].mlp, counted)
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        counted.clear()
        model.model.layers[1].token_router.estimates[0] = torch.inf
        model(ids[:, 7:], past_key_values=cache, use_cache=True)
    assert counted == []
    assert [cache.get_seq_length(layer) for layer in range(2)] == [8, 8]


def test_beams_find_the_same_with_and_without_a_cache() -> None:
    model, ids = trained("llama", METHOD), token_windows(2, 6)
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache, without = (model.generate(ids, use_cache=use_cache, **how) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


def test_padding_on_the_left_changes_nothing_that_is_generated() -> None:
    model, ids = trained("llama", METHOD), token_windows(2, 6)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(2, 3), torch.ones(2, 6)), 1).long()
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **how)[:, 9:], plain)


def test_a_cache_of_fixed_length_is_refused() -> None:
    model, ids = trained("llama", METHOD), token_windows(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad(), pytest.raises(ValueError, match=r"pass past_key_values=DynamicCache"):
        model(ids, past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_the_base_is_frozen_and_norms_learn() -> None:
    model, _ = inserted("gpt2", METHOD)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = {name for name in learning if ".adapter." in name or ".token_router." in name}
    assert len(added) == 2 * 3
    assert learning - added == {n for n, _ in model.named_parameters() if ".ln_" in n}
    assert len(routers_of(model)) == 2


def test_a_block_that_counts_positions_by_itself_is_refused_and_can_be_left_out() -> None:
    if not STACKS_EXPERTS:
        pytest.skip("every block of Transformers 4's T5 counts positions by itself, so none can be left in")
    model = tiny_family("t5").eval()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"encoder\.block\.0 \(T5Block\) cannot run on some tokens.*leave.*`layers`"):
        METHOD.insert(model, stack_of(model))
    assert set(model.state_dict()) == before
    condition = ConditionalAdapter(adapter_width=4, layers=(1,)).insert(model, stack_of(model))
    assert set(condition.added()) == {"encoder.block.1.token_router", "encoder.block.1.adapter"}
    ids = token_windows(2, 9)
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_kernels_whose_masks_cannot_be_read_are_refused() -> None:
    model = tiny_family("llama")
    stack = stack_of(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="need attn_implementation eager or sdpa, got 'flash_attention_2'"):
        METHOD.insert(model, stack)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": 0.5}, "reduction must be 1 or more"), ({"adapter_width": 0}, "adapter_width must be 1 or more")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionalAdapter(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [(2,), (0, 0), ()])
def test_layers_that_do_not_exist_are_refused(layers: tuple[int, ...]) -> None:
    model = tiny_family("llama")
    with pytest.raises(ValueError, match="layers must be numbers from 0 to 1, each once"):
        ConditionalAdapter(layers=layers).insert(model, stack_of(model))

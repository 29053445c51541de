"""Cut FFN units and a block out of a model, once, and open what is left with the stock class."""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_prune.structured import Plan, Width, discover, shrink
from lightning_prune.structured.depth.methods import ShortGPT


def batches(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return bytes of the standard library's own sources as calibration data."""
    text = Path(argparse.__file__).read_bytes()[: 64 * length]
    return [{"input_ids": ids} for ids in torch.tensor(list(text)).view(-1, length).split(16)]


def cut(model: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """Return what a plan keeps, and say how large it is."""
    small = shrink(model, plan)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    print(f"parameters: {before:,} -> {after:,}")
    return small


def main() -> None:
    """Cut in width, then in depth, and save."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
    )
    model: torch.nn.Module = LlamaForCausalLM(config).eval()
    model = cut(model, Width(sparsity={"ffn": 0.25}).plan(model, discover(model), batches(), progress=False))
    model = cut(model, ShortGPT(num_blocks=1).plan(model, discover(model), batches(), progress=False))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # type: ignore[operator]
        opened = AutoModelForCausalLM.from_pretrained(folder)
    print(f"opened: {opened.config.num_hidden_layers} blocks, {opened.config.intermediate_size} FFN units")


if __name__ == "__main__":
    main()

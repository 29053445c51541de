"""Prune inside TRL's own fine-tuning program, which stays as it is: `lightning-prune exec` adds the callback."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_model(folder: Path) -> None:
    """Write a tiny model with a tokenizer of single characters."""
    signs = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=len(signs), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write pieces of the standard library's own sources as a data set."""
    folder.mkdir()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    pieces = [text[start : start + 100] for start in range(0, 40_000, 100)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def main() -> None:
    """Write model and data, run TRL under `exec`, and count the zeros of what TRL saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "model"))
        write_data(Path(folder, "data"))
        program = {
            "model_name_or_path": f"{folder}/model",
            "dataset_name": f"{folder}/data",
            "output_dir": f"{folder}/out",
            "max_steps": steps,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
        }
        options = [str(part) for name, value in program.items() for part in (f"--{name}", value)]
        command = ["exec", "--recipe", "train/gradual_magnitude", "--", "-m", "trl.scripts.sft", "--use_cpu", *options]
        subprocess.run([sys.executable, "-m", "lightning_prune", *command], check=True)
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/out")
    weight = model.model.layers[0].mlp.up_proj.weight
    print(f"zeros in a saved weight: {(weight == 0).float().mean():.3f}")


if __name__ == "__main__":
    main()

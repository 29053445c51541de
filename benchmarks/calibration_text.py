"""What the calibration text costs a story model that is pruned once: Python's sources, its own text, stories.

    LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/calibration_text.py

50 % of every row by Wanda, as `lightning-prune oneshot --config oneshot/wanda_half` prunes, with the text that --data
names. Perplexity: the first 100,000 characters of tinystories_v1_valid.txt, in windows of 256 tokens, each read on its
own after the start token.
"""

import argparse
import time

import torch
from measure import data_folder, load_story_model, print_table, write_result
from quality_unstructured import NUM_CHARACTERS, REFERENCE, WINDOW, perplexity, windows
from transformers import AutoTokenizer

from lightning_prune import Once, Sparsifier
from lightning_prune.integrations.text.calibration_text import Text
from lightning_prune.scorers.wanda import Wanda

NAME, MODEL, SPARSITY = "calibration_text", "stories3M", 0.5


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_sequences", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the text that the model writes")
    args = parser.parse_args()
    folder = data_folder()
    _, encode = load_story_model(MODEL)
    valid = windows(encode, (folder / "text/tinystories_v1_valid.txt").read_text(encoding="utf-8")[:NUM_CHARACTERS])
    stories = str(folder / "text/tinystories_v1_train.txt")
    sources = [("Python's sources", "python", 0), *(("its own text", "self", seed) for seed in args.seeds)]
    rows = [
        measure(label, data, seed, args.num_sequences, valid)
        for label, data, seed in [*sources, ("stories", stories, 0)]
    ]
    print_table(
        ("text", "seed", "perplexity", "seconds to get it"),
        [[row["text"], str(row["seed"]), f"{row['perplexity']:.2f}", f"{row['seconds']:.1f}"] for row in rows],
    )
    settings = {
        "model": MODEL,
        "dense_perplexity": REFERENCE[MODEL],
        "pruning": f"Wanda, {SPARSITY:.0%} of every row, all linear layers in the blocks",
        "calibration": f"{args.num_sequences} sequences of {WINDOW} tokens",
        "perplexity": f"first {NUM_CHARACTERS} characters of tinystories_v1_valid.txt, windows of {WINDOW} tokens",
        "own text": "sampled at temperature 1 from the start token, without cutting off the tail",
        "command": "LIGHTNING_PRUNE_DATA=FOLDER OMP_NUM_THREADS=1 python benchmarks/calibration_text.py",
    }
    write_result(NAME, seed=0, settings=settings, rows=rows)


def measure(label: str, data: str, seed: int, num_sequences: int, valid: list[torch.Tensor]) -> dict[str, object]:
    """Prune a fresh model with one text, and return its perplexity on stories."""
    model, _ = load_story_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "models" / MODEL)
    model.eval()
    text = Text(data=data, num_sequences=num_sequences, sequence_length=WINDOW, seed=seed)
    start = time.perf_counter()
    passages = text.passages(model, tokenizer, text.read())  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    Sparsifier(scorer=Wanda(), schedule=Once(sparsity=SPARSITY)).prune_once(model, passages.calibration)
    with torch.no_grad():
        found = perplexity(model, valid)
    return {"text": label, "seed": seed, "perplexity": round(found, 4), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()

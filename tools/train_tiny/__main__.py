"""The command line: text, tokenizer, training, held-out loss, and the finished folder."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path

import click
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from tools.train_tiny import corpus
from tools.train_tiny.corpus import SourceFile
from tools.train_tiny.held_out import WINDOW_TOKENS, held_out_loss
from tools.train_tiny.training import SMOKE, Recipe, new_model, train


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", default=0, help="Weights and order of batches.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--smoke", is_flag=True, help="A far smaller model, about a minute on a CPU.")
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--rate", type=float, help="Peak learning rate, instead of the recipe's.")
@click.option("--with-tests", is_flag=True, help="Also train on the library's own tests.")
@click.option("--max-files", type=click.IntRange(min=1), help="Take so many files of each side.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's own choice.")
def main(
    out: Path,
    seed: int,
    device: str,
    smoke: bool,
    steps: int | None,
    batch_size: int | None,
    rate: float | None,
    with_tests: bool,
    max_files: int | None,
    threads: int | None,
) -> None:
    """Train a model like baton-tiny from the running Python's standard library."""
    console = Console(highlight=False)
    disable_progress_bar()
    recipe = SMOKE if smoke else Recipe()
    chosen = {"num_steps": steps, "batch_size": batch_size, "peak_rate": rate}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in chosen.items() if v is not None})
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"

    with console.status("reading the standard library and training the tokenizer"):
        files = corpus.standard_library(with_tests=with_tests)
        training = [file for file in files if not file.held_out][:max_files]
        held_out = [file for file in files if file.held_out][:max_files]
        tokenizer = corpus.train_tokenizer(training, recipe.vocab_size)
        stream = torch.cat(corpus.encode(tokenizer, [file.text for file in training]))
    console.print(
        f"Python {platform.python_version()}: {len(training)} files, {len(stream):,} tokens; "
        f"{len(held_out)} files held out; training on {device}"
    )
    if len(stream) <= recipe.sequence_tokens:
        raise click.ClickException("too little text: raise --max-files")

    torch.manual_seed(seed)
    model = new_model(recipe).to(device)
    losses = train(model, stream, recipe, seed, console)
    save(model, tokenizer, held_out, recipe, out)

    with console.status("measuring the loss on the held-out files"):
        # Of the folder as written: weights rounded to bfloat16, computed in float32.
        saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).to(device)
        documents = corpus.encode(tokenizer, [file.text for file in held_out])
        loss, num_tokens = held_out_loss(saved, documents)
    write_readme(out, recipe, seed, len(training), len(stream), loss, num_tokens)
    console.print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    console.print(f"held-out loss {loss:.3f} nats per token over {num_tokens:,} tokens")
    console.print(f"wrote {out}")


def save(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    held_out: list[SourceFile],
    recipe: Recipe,
    out: Path,
) -> None:
    """A folder in Hugging Face format, and ``held_out.txt`` with the names of those files."""
    model.to(torch.bfloat16).save_pretrained(out)
    # The library writes weights for their owner alone; a model folder is there to be read.
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "add_bos_token": True,
        "bos_token": corpus.BEGIN,
        "eos_token": corpus.END,
        "model_max_length": recipe.max_positions,
        "pad_token": corpus.PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (out / "held_out.txt").write_text("".join(f"{file.name}\n" for file in held_out))


def write_readme(
    out: Path,
    recipe: Recipe,
    seed: int,
    num_files: int,
    num_tokens: int,
    loss: float,
    num_held_out_tokens: int,
) -> None:
    values = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(recipe).items())
    (out / "README.md").write_text(
        f"# {out.name}\n\n"
        "A Llama-architecture model trained from random weights on the sources of the Python "
        f"{platform.python_version()} standard library\n(PSF licence), {num_files} files and "
        f"{num_tokens:,} tokens, by `python -m tools.train_tiny`, seed {seed}.\n\n"
        f"Recipe: {values}.\n\n"
        f"held-out loss: {loss:.3f} nats per token over {num_held_out_tokens:,} tokens of the "
        f"files in held_out.txt\n({WINDOW_TOKENS:,}-token windows, weights as stored, computed "
        "in float32).\n"
    )


if __name__ == "__main__":
    main()

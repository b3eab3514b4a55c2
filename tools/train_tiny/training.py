"""The model and the loop that trains it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tools.train_tiny.corpus import BEGIN_ID, END_ID, PAD_ID

REPORT_EVERY_S = 10.0
"""Between lines of progress where there is no terminal to draw a bar on."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One step sees ``batch_size x sequence_tokens`` tokens."""

    vocab_size: int = 2_048
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 4_096
    sequence_tokens: int = 1_024
    batch_size: int = 8
    num_steps: int = 3_000
    warmup_steps: int = 100
    peak_rate: float = 3e-3
    weight_decay: float = 0.1


SMOKE = Recipe(
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    sequence_tokens=256,
    batch_size=4,
    num_steps=120,
    warmup_steps=10,
)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """Random weights in float32, from torch's current seed."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=recipe.max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up to the peak, then a half cosine down to a tenth of it."""
    if step < recipe.warmup_steps:
        return recipe.peak_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return recipe.peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe, seed: int, console: Console
) -> list[float]:
    """Losses of all steps. stream: int64 ``[num_tokens]``, every document behind the other."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others}],
        lr=recipe.peak_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    on_gpu = model.device.type == "cuda"
    batches = _batches(stream, recipe, seed)
    losses: list[float] = []
    model.train()
    with _Report(console, recipe.num_steps) as report:
        for step in range(recipe.num_steps):
            ids = next(batches).to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
                logits = model(ids[:, :-1]).logits
            loss = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, recipe)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(
                    f"error: the loss is {losses[-1]} at step {step}; try a lower --rate"
                )
            report.step(losses[-1])
    model.eval()
    return losses


def _batches(stream: torch.Tensor, recipe: Recipe, seed: int) -> Iterator[torch.Tensor]:
    """Endless ``[batch_size, sequence_tokens + 1]`` windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    length = recipe.sequence_tokens + 1
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(
            len(stream) - length + 1, (recipe.batch_size, 1), generator=generator
        )
        yield stream[starts + offsets]


class _Report:
    """A bar on a terminal; elsewhere a line every now and then, with loss and time left."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._done = 0
        self._loss = float("nan")
        self._started_s = self._reported_s = time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, loss=float("nan"))

    def __enter__(self) -> _Report:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def step(self, loss: float) -> None:
        self._done += 1
        # One step's loss jumps about; what is shown is smoothed over about 20 steps.
        self._loss = loss if self._done == 1 else 0.95 * self._loss + 0.05 * loss
        self._bar.update(self._task, advance=1, loss=self._loss)
        now_s = time.monotonic()
        last = self._done == self._num_steps
        if not self._console.is_terminal and (last or now_s - self._reported_s > REPORT_EVERY_S):
            self._reported_s = now_s
            left_s = (now_s - self._started_s) / self._done * (self._num_steps - self._done)
            self._console.print(
                f"step {self._done}/{self._num_steps}  loss {self._loss:.3f}  {left_s:.0f} s left"
            )

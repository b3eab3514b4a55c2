"""Fill a model's parameters from safetensors files, one tensor at a time.

Files are memory-mapped, and mapped anew every MAX_MAPPED_BYTES: pages that were read count as the
process's memory for as long as their mapping lives, so one mapping of a whole file would be a
second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.checkpoint.find import weight_files
from baton.checkpoint.spec import ModelSpec
from baton.engine.models.parameters import Destination, Parameters, allocate, destinations
from baton.engine.parallel.shard import WHOLE, Shard, part_of, pieces
from baton.protocol.errors import ConfigError, UnsupportedModel

Progress = Callable[[int, int], None]
"""Called with (bytes of the parameters filled so far, bytes in all), on the loading thread."""
MAX_MAPPED_BYTES = 32 * 2**20

_LOADABLE = (torch.float32, torch.bfloat16, torch.float16)
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)
_SHOWN_NAMES = 5
_FOREIGN = {
    ("qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "absmax"): (
        "it belongs to quantised weights: take the checkpoint that this one was made from"
    ),
    ("lora_A", "lora_B", "lora_magnitude_vector"): (
        "it belongs to a LoRA adapter: merge adapters into the weights first"
    ),
}
"""What a part of a tensor's name tells about it."""


def load_parameters(
    folder: Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> Parameters:
    """Parameters converted to ``dtype`` on ``device``; of several ranks, the part of one.

    spec: of the whole model.

    Raises ConfigError or UnsupportedModel that names the tensor and the file: one that is
    missing, has another shape than config.json says, another kind of numbers, or no place.
    """
    part = part_of(spec, shard)
    parameters = allocate(part, dtype, device)
    wanted = destinations(part, parameters)
    whole = destinations(spec, allocate(spec, dtype, torch.device("meta")))
    total_bytes = sum(to.view.nbytes for to in wanted.values())
    filled: set[str] = set()
    filled_bytes = 0
    for path in weight_files(folder):
        try:
            for name, source in _tensors(path):
                if name not in wanted:
                    if _is_ignored(name, spec):
                        continue
                    _refuse(path, name, spec)
                if name in filled:
                    raise ConfigError(f"{path}: {name} is also in another file", param=name)
                _check(path, name, source, whole[name])
                _fill(source, wanted[name], whole[name], shard)
                filled.add(name)
                filled_bytes += wanted[name].view.nbytes
                if progress is not None:
                    progress(filled_bytes, total_bytes)
        except (SafetensorError, OSError) as exc:
            raise ConfigError(f"{path}: cannot be read as safetensors ({exc})") from exc
    _check_complete(folder, wanted, filled, spec)
    return parameters


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file as a view of its mapping, to be let go before the next one."""
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
    done = 0
    while done < len(names):
        mapped_bytes = 0
        with safe_open(path, framework="pt", device="cpu") as file:
            while done < len(names) and mapped_bytes < MAX_MAPPED_BYTES:
                tensor = file.get_tensor(names[done])
                done, mapped_bytes = done + 1, mapped_bytes + tensor.nbytes
                yield names[done - 1], tensor


def _check(path: Path, name: str, source: Tensor, whole: Destination) -> None:
    shape = whole.view.shape[1:] if whole.repeated else whole.view.shape
    if source.shape != shape:
        raise ConfigError(
            f"{path}: {name} has shape {list(source.shape)}; config.json says {list(shape)}",
            param=name,
        )
    if source.dtype not in _LOADABLE:
        raise UnsupportedModel(
            f"{path}: {name} holds {str(source.dtype).removeprefix('torch.')}; "
            "supported: float32, bfloat16, float16",
            param=name,
        )


def _fill(source: Tensor, to: Destination, whole: Destination, shard: Shard) -> None:
    """``source`` views the mapped file: only the pages that hold what is copied are read."""
    if to.summed and shard.rank > 0:
        to.view.zero_()
        return
    segments = tuple(zip(whole.segments, to.segments, strict=True))
    cut = [] if to.repeated else pieces(whole.view.shape, to.view.shape, shard, segments)
    if not cut:
        to.view.copy_(source)
    elif sum(piece.length for piece in cut) < to.view.shape[cut[0].axis]:
        to.view.zero_()
    for piece in cut:
        target = to.view.narrow(piece.axis, piece.target, piece.length)
        target.copy_(source.narrow(piece.axis, piece.source, piece.length))
    if to.offset:
        to.view.add_(to.offset)


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Tensors some exporters write although they follow from others."""
    tied_copy = spec.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith(_DERIVED_SUFFIXES)


def _refuse(path: Path, name: str, spec: ModelSpec) -> NoReturn:
    parts = set(name.split("."))
    hints = [hint for marks, hint in _FOREIGN.items() if parts & set(marks)]
    hint = hints[0] if hints else "do config.json and weights come from the same folder?"
    raise UnsupportedModel(
        f"{path}: {name} has no place in a {spec.architecture} as config.json describes it; "
        f"supported: checkpoints of exactly the tensors that the config implies ({hint})",
        param=name,
    )


def _check_complete(folder: Path, wanted: Iterable[str], filled: set[str], spec: ModelSpec) -> None:
    missing = [name for name in wanted if name not in filled]
    if not missing:
        return
    listed = ", ".join(missing[:_SHOWN_NAMES])
    more = f" and {len(missing) - _SHOWN_NAMES} more" if len(missing) > _SHOWN_NAMES else ""
    hint = ""
    if missing == ["lm_head.weight"]:
        hint = "; if the checkpoint shares it with the embedding, set tie_word_embeddings to true"
    raise ConfigError(
        f"model folder {folder}: the weights lack {listed}{more} of the "
        f"{spec.num_layers}-layer {spec.architecture} in config.json{hint}",
        param=missing[0],
    )

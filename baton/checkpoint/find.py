"""From what a user writes for a model to a folder that has every file we need."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from baton.checkpoint.fields import read_json_object, show
from baton.protocol.errors import ConfigError, UnsupportedModel

BUNDLE_PACKAGE = "deploy"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
SINGLE_WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
PIPELINE_FILE = "model_index.json"
INDEX_FILE = "model.safetensors.index.json"

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_SHOWN_NAMES = 3


def resolve(path_or_name: str) -> Path:
    """The absolute folder of a checkpoint: a local folder first, else a bundled model's name.

    Raises ConfigError that says what was looked for and where, or which file is missing.
    """
    local = Path(path_or_name).expanduser()
    if path_or_name and local.is_dir():
        folder = local.resolve()
    else:
        folder = _bundled(path_or_name, looked_at=local)
    _refuse_other_kinds(folder)
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ConfigError(f"model folder {folder}: {name} is missing", param="model.path")
    weight_files(folder)
    return folder


def _refuse_other_kinds(folder: Path) -> None:
    """Folders that look like a checkpoint and are something else, by the file that tells."""
    adapter = folder / ADAPTER_FILE
    if adapter.is_file():
        base = show(read_json_object(adapter).get("base_model_name_or_path"))
        raise UnsupportedModel(
            f"model folder {folder}: {ADAPTER_FILE} makes it an adapter of {base}; supported: "
            "whole models (merge it into its base first, with merge_and_unload of peft)",
            param="model.path",
        )
    pipeline = folder / PIPELINE_FILE
    if pipeline.is_file() and not (folder / CONFIG_FILE).is_file():
        parts = show(read_json_object(pipeline).get("_class_name"))
        raise UnsupportedModel(
            f"model folder {folder}: {PIPELINE_FILE} makes it a pipeline ({parts}) of several "
            "models; supported: the folder of one text decoder",
            param="model.path",
        )


def bundled_models_folder() -> Path | None:
    """``models`` of the installed ``deploy`` package; None when that is not on disk."""
    try:
        root = importlib.resources.files(BUNDLE_PACKAGE)
    except ModuleNotFoundError:
        return None
    models = root / "models"
    return models if isinstance(models, Path) and models.is_dir() else None


def bundled_model_names() -> tuple[str, ...]:
    models = bundled_models_folder()
    if models is None:
        return ()
    return tuple(sorted(f.name for f in models.iterdir() if (f / CONFIG_FILE).is_file()))


def _bundled(name: str, looked_at: Path) -> Path:
    names = bundled_model_names()
    models = bundled_models_folder()
    # Only a listed name is joined to the path, so that ``../..`` cannot leave the folder.
    if models is not None and name in names:
        return (models / name).resolve()
    what = "a file, not a folder" if looked_at.is_file() else "no folder there"
    raise ConfigError(
        f"model {name!r}: {what} ({looked_at.absolute()}), and no bundled model has that name; "
        f"bundled: {', '.join(names) or 'none found'}. "
        "Give the folder of a Hugging Face checkpoint or a bundled name",
        param="model.path",
    )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the weights, in a stable order.

    ``model.safetensors`` wins, then what the index lists, then every ``*.safetensors``.
    """
    single = folder / SINGLE_WEIGHTS_FILE
    if single.is_file():
        return (single,)
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed_files(folder, index)
    found = tuple(sorted(f for f in folder.glob("*.safetensors") if f.is_file()))
    if not found:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in _OTHER_FORMATS)
        seen = f"; there is {', '.join(others[:_SHOWN_NAMES])}" if others else ""
        raise ConfigError(
            f"model folder {folder}: no weights: neither {SINGLE_WEIGHTS_FILE} nor {INDEX_FILE} "
            f"nor any other *.safetensors (convert other formats to safetensors first){seen}",
            param="model.path",
        )
    return found


def _indexed_files(folder: Path, index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map must map tensor names to files", param="weight_map")
    names: set[str] = set()
    for tensor, name in weight_map.items():
        # A plain name only: an index must not make us read outside of its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(
                f"{index}: weight_map[{show(tensor)}] is {show(name)}; "
                "expected a file name without folders",
                param="weight_map",
            )
        names.add(name)
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(
            f"model folder {folder}: {missing[0]} is missing ({INDEX_FILE} lists {len(names)} "
            f"weight files, {len(missing)} of them are not there)",
            param="model.path",
        )
    return tuple(folder / name for name in sorted(names))

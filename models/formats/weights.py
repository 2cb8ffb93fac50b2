"""A network's folder in diffusers' format: `config.json` and `diffusion_pytorch_model.safetensors`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.errors import UserError
from conf.files import atomic_path, atomic_write
from conf.plain_json import dumps
from models.formats.tensor_stream import TensorStream, stream_of, write_stream

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

Weights = Mapping[str, Tensor] | TensorStream  # all at hand, or made while they are written

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a class of diffusers and one of our dataclasses describe the same network."""

    class_name: str  # of diffusers
    fixed: Mapping[str, Any]  # fields of that class which the network knows in one value only (per level too)
    absent: Mapping[str, Any] = field(default_factory=dict)  # that class's defaults where the dataclass has others
    ignored: tuple[str, ...] = ()  # fields that say nothing about the network's output
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict  # fields that mean another thing in the dataclass


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    weights: Weights,
    weights_name: str = WEIGHTS_NAME,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write both files, each whole or not at all; the configuration last. `metadata`: of the weights' file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file_atomic(folder / weights_name, weights, metadata)
    text = dumps(config, indent=2, sort_keys=True) + "\n"
    atomic_write(folder / CONFIG_NAME, text.encode())


def save_file_atomic(path: Path, weights: Weights, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all; raises UserError where a weight is not finite."""
    stream = weights if isinstance(weights, TensorStream) else stream_of(weights)
    stream = TensorStream(stream.specs, _finite_ones(path, stream))
    with atomic_path(path) as temporary:
        write_stream(temporary, stream, metadata={"format": "pt", **(metadata or {})})


def _finite_ones(path: Path, stream: TensorStream) -> Iterator[Tensor]:
    for name, tensor in zip(stream.specs, stream.tensors, strict=True):
        if not is_finite(tensor):
            remedy = ": set dtype=fp32" if tensor.dtype is torch.float16 else ""
            raise UserError(f"{path} is not written: its '{name}' would hold NaN or infinity{remedy}")
        yield tensor


def read_json(path: Path, weights_name: str) -> dict[str, Any]:
    """The object in a `config.json` that stands beside `weights_name`; raises UserError when there is none."""
    try:
        found = json.loads(path.read_bytes())  # schedulers of diffusers have an infinity that nothing here reads
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder that holds {CONFIG_NAME} and {weights_name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def read_config(folder: str | Path, kind: type[C], *forms: Format) -> C:
    """`config.json` as the dataclass `kind`, in one of the formats `forms`.

    Raises:
        UserError: no such file, another class, or a field or value that the network does not have.
    """
    path = Path(folder) / CONFIG_NAME
    found = read_json(path, WEIGHTS_NAME)
    form = next((form for form in forms if form.class_name == found.get("_class_name")), None)
    if form is None:
        raise UserError(f"{path}: not the configuration of a {' or '.join(form.class_name for form in forms)}")
    known = {item.name: item.type for item in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in form.translate({**form.absent, **found}).items():
        if name in known:
            if value is not None or type(None) in get_args(known[name]):  # a null elsewhere stands for the default
                values[name] = _checked(path, name, value, known[name])
        elif name in form.fixed:
            levels = value if isinstance(value, list) else [value]
            if any(level != form.fixed[name] for level in levels):
                raise UserError(f"{path}: {name}={value!r} is not supported, only {form.fixed[name]!r}")
        # An unknown field that is null or false names a feature that the checkpoint does not use either.
        elif not name.startswith("_") and name not in form.ignored and value is not None and value is not False:
            raise UserError(f"{path}: {name}={value!r} is not supported")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('model.')}") from None


def _checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    """A JSON value as the field's type; diffusers writes one number where all levels share it."""
    if get_origin(kind) is list:
        element = kind.__args__[0]
        items = value if isinstance(value, list) else [value]
        if all(type(item) is element for item in items):
            return items
    elif type(value) in (kind, *get_args(kind)) and not (type(value) is float and not math.isfinite(value)):
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise UserError(f"{path}: {name}={value!r} is not supported, it must be {getattr(kind, '__name__', kind)}")


def load_folder(folder: str | Path, build: Callable[[], M], renamed: Mapping[str, str] | None = None) -> M:
    """The network of `build()` in fp32 with the weights of the folder, every one of them used.

    Args:
        build: called with the meta device as default, so that no weight is drawn and thrown away.
        renamed: old parts of parameter names -> those of today.

    Raises:
        UserError: a missing or broken file; missing, surplus or misshapen parameters, by name.
    """
    with torch.device("meta"):
        network = build()
    weights = read_folder(folder, network.state_dict(), renamed)
    network.load_state_dict(copied(weights), assign=True)
    return network


def copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In fp32 and apart from their file: that may be replaced, and does not decide the precision of a training."""
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}


def read_folder(
    folder: str | Path, expected: Mapping[str, Tensor], renamed: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Weights of a folder by the names of `expected`, as its file has them, which takes no memory; as `load_folder`."""
    path = Path(folder) / WEIGHTS_NAME
    weights = read_tensors(path, f"give a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    for old, new in (renamed or {}).items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    check_names(str(path), expected, weights)
    return {name: weights[name] for name in expected}


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory; `remedy`: what a UserError says where it is missing.

    Raises:
        UserError: no such file, a broken one, or one with a weight that is not finite.
    """
    try:
        return require_finite(path, load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it again") from None


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; nothing where there is no such file, or a broken one."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def require_finite(path: str | Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, as they were read; raises UserError that names the first that is not finite.

    One such value makes all that a network computes, and every gradient, NaN.
    """
    for name, tensor in weights.items():
        if not is_finite(tensor):
            raise UserError(f"{path}: its '{name}' holds NaN or infinity: copy it again, or take an earlier version")
    return dict(weights)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; those of whole numbers are."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())  # no isfinite in 8 bits


def check_names(where: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise a UserError that names missing, surplus and misshapen parameters, if there are any."""
    problems = {
        "missing": [name for name in expected if name not in found],
        "surplus": [name for name in found if name not in expected],
        "misshapen": [
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in found and found[name].shape != tensor.shape
        ],
    }
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    if parts:
        raise UserError(f"{where} does not fit the network ({'; '.join(parts)})")

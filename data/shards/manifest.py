"""`manifest.json` beside the shards: what is there, how it was made, and its statistics."""

import hashlib
import sys
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.files import atomic_write
from conf.plain_json import dumps, loads_finite
from conf.schema import StreamConfig
from data.shards.remote import is_remote, joined, read_remote
from data.shards.shard import ShardInfo, tars_in
from data.shards.tar_index import scan_indices

__all__ = ["MANIFEST", "Manifest", "ShardInfo", "find_shards", "folder_of"]

MANIFEST = "manifest.json"
SCHEMA = 1
FIELDS = {"kind": str, "shards": list, "provenance": dict, "stats": dict}
SHARD_FIELDS = {"name", "samples", "bytes", "sha256"}  # and "index", which older ones do not have
SIDES = ("train", "heldout")
HELDOUT = 0.04  # of foreign shards
CHECKED = 4096  # shards whose files are looked at before any is read; each is looked at again when it is opened
REMEDY = {
    "images": "run data/build_shards.py or set shards=FOLDER",
    "latents": "run data/precompute_latents.py or set latents=FOLDER",
}


@dataclass(kw_only=True, slots=True)
class Manifest:
    """One data set: the shards of a folder, in order."""

    kind: str  # "images" or "latents"
    shards: list[ShardInfo]
    provenance: dict[str, Any] = field(default_factory=dict)  # how it was made: source, encoder hashes, preprocessing
    stats: dict[str, Any] = field(default_factory=dict)  # measured: latent mean and std per channel, PSNR …
    schema: int = SCHEMA

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def as_dict(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        return {**self._head(), "shards": [_shard_dict(shard) for shard in self.shards]}

    def _head(self) -> dict[str, Any]:
        """Entries of the manifest without its shards."""
        return {
            "schema": self.schema,
            "kind": self.kind,
            "samples": self.samples,
            "bytes": self.bytes,
            "provenance": self.provenance,
            "stats": self.stats,
        }

    def digest(self) -> str:
        """Identity of the data set: sha256, in hex, of the manifest as canonical JSON, shard by shard."""
        # Keys are sorted: the shards lie between these. To look for them in one text fails: provenance may have any.
        before = _canonical({name: value for name, value in self._head().items() if name < "shards"})
        after = _canonical({name: value for name, value in self._head().items() if name > "shards"})
        digest = hashlib.sha256(before[:-1].encode() + b',"shards":[')
        for number, shard in enumerate(self.shards):
            known = _shard_dict(shard)
            known.pop("index", None)  # says nothing that the shard itself does not
            digest.update(b"," * (number > 0) + _canonical(known).encode())
        digest.update(b"]," + after[1:].encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into the folder, atomically; one line for each shard."""
        head = dumps(self._head(), indent=1).removesuffix("\n}")
        shards = ",\n".join("  " + dumps(_shard_dict(shard)) for shard in self.shards)
        atomic_write(Path(folder) / MANIFEST, f'{head},\n "shards": [\n{shards}\n ]\n}}\n'.encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `manifest.json` of the folder; `UserError` when it is not one."""
        path = joined(folder, MANIFEST)
        try:
            content = loads_finite(read_remote(path), object_hook=_shard_or_dict)
            if content["schema"] != SCHEMA:
                raise UserError(
                    f"{path} has schema {content['schema']}, this version reads {SCHEMA}: rebuild the shards"
                )
            if not all(isinstance(shard, ShardInfo) and shard.is_sound() for shard in content["shards"]):
                raise ValueError("a shard without name, samples, bytes and sha256")
            for name, kind in FIELDS.items():
                if type(content[name]) is not kind:
                    raise ValueError(f"{name} is not {kind.__name__}")
            return cls(**{name: content[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is not a manifest ({error!r}): rebuild the shards or delete it") from None


def _shard_dict(shard: ShardInfo) -> dict[str, Any]:
    known = {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256}
    return known | ({"index": shard.index} if shard.index else {})


def _shard_or_dict(content: dict[str, Any]) -> Any:
    """Shards as what they are at once: as dictionaries a hundred thousand of them would take ten times the memory."""
    return ShardInfo(**content) if content.keys() - {"index"} == SHARD_FIELDS else content


def _canonical(content: Any) -> str:
    return dumps(content, sort_keys=True, separators=(",", ":"))


def find_shards(folder: str | Path, kind: str = "images", stream: StreamConfig | None = None) -> Manifest:
    """Return the manifest of a folder; of foreign shards (img2dataset) without one, what their indices say.

    `UserError` when there are no shards, when they are of another kind, or, unless broken ones are to be skipped, when
    a file is not as the manifest says.
    """
    stream = stream or StreamConfig()
    try:
        manifest = Manifest.load(folder)
    except FileNotFoundError:
        if is_remote(folder):
            raise UserError(
                f"no {MANIFEST} at '{folder}': upload the whole folder that the shards were made in"
            ) from None
        manifest = _scan(Path(folder), kind, stream)
    else:
        _check_names(folder, manifest)
        if not is_remote(folder) and not stream.skip_broken:
            _check_files(Path(folder), manifest)
        if not manifest.samples and Path(folder).name == "heldout":
            raise UserError(f"'{folder}' holds no samples: build the shards with heldout_fraction above 0")
    if manifest.shards and not manifest.samples:
        names = ", ".join(shard.name for shard in manifest.shards[:3]) + " …" * (len(manifest.shards) > 3)
        raise UserError(f"'{folder}' holds no samples, its shards are empty ({names}): {REMEDY[kind]}")
    if manifest.samples == 0:
        raise UserError(f"no {'latents' if kind == 'latents' else 'shards'} at '{folder}': {REMEDY[kind]}")
    if manifest.kind != kind:
        raise UserError(f"'{folder}' holds {manifest.kind}, not {kind}: {REMEDY[kind]}")
    return manifest


def folder_of(folder: str | Path) -> str | Path:
    """Folder of the shards of a data set: `FOLDER/train` and `FOLDER/heldout` of foreign shards both lie in FOLDER."""
    if is_remote(folder):
        return folder
    folder = Path(folder)
    flat = folder.name in SIDES and not folder.exists() and bool(tars_in(folder.parent))
    return folder.parent if flat else folder


def _check_names(folder: str | Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        if Path(shard.name).name != shard.name:
            raise UserError(f"{joined(folder, MANIFEST)}: '{shard.name}' leaves the folder: rebuild the shards")


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Find what is missing now and not in hours; of very many shards some, as each process asks for each of them."""
    for shard in manifest.shards[:: ceil(len(manifest.shards) / CHECKED) or 1]:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"shard {path} is missing: rebuild it, or delete {MANIFEST} to use the shards that exist")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"shard {path} has {size} bytes, not {shard.bytes} as {MANIFEST} says: rebuild it")


def _scan(folder: Path, kind: str, stream: StreamConfig) -> Manifest:
    """Foreign shards by their indices, which the processes that start together share out.

    In a flat folder the last 4 % of them are held out, at least one.
    """
    there = Path(folder_of(folder))
    paths = tars_in(there)
    if kind == "latents" and paths:
        raise UserError(f"'{there}' has shards but no {MANIFEST}: {REMEDY['latents']}")
    if there != folder:
        if len(paths) < 2:
            raise UserError(f"'{there}' has a single shard, none is left to hold out: {REMEDY['images']}")
        heldout = max(1, round(HELDOUT * len(paths)))
        paths = paths[:-heldout] if folder.name == "train" else paths[-heldout:]
    for path in tars_in(there, compressed=True):
        print(f"left out: shard {path} is compressed: make a plain .tar of it", file=sys.stderr)
    found = dict[Path, ShardInfo]()
    for path, index in scan_indices(paths, stream.cache_dir):
        if isinstance(index, UserError):
            if not stream.skip_broken:
                raise index
            print(f"left out: {index}", file=sys.stderr)
            continue
        found[path] = ShardInfo(name=path.name, samples=len(index), bytes=path.stat().st_size)
        if index.others:
            count, first = len(index.others), index.others[0]
            print(f"left out: {count} files without an extension in {path}, such as '{first}'", file=sys.stderr)
    shards = [found[path] for path in paths if path in found]
    return Manifest(kind=kind, shards=shards, provenance={"source": "foreign shards"} if shards else {})

"""`manifest.json` beside the shards: what is there, how it was made, and its statistics."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data.shards import ShardInfo, ShardReader, atomic_write

__all__ = ["MANIFEST", "Manifest", "ShardInfo", "find_shards"]

MANIFEST = "manifest.json"
SCHEMA = 1
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
        """What `manifest.json` holds."""
        return {
            "schema": self.schema,
            "kind": self.kind,
            "shards": [asdict(shard) for shard in self.shards],
            "samples": self.samples,
            "bytes": self.bytes,
            "provenance": self.provenance,
            "stats": self.stats,
        }

    def digest(self) -> str:
        """Identity of the data set: sha256, in hex, of the manifest as canonical JSON."""
        canonical = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` into the folder, atomically."""
        atomic_write(Path(folder) / MANIFEST, (json.dumps(self.as_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read `manifest.json` of the folder; `UserError` when it is not one."""
        path = Path(folder) / MANIFEST
        try:
            content = json.loads(path.read_text())
            if content["schema"] != SCHEMA:
                raise UserError(
                    f"{path} has schema {content['schema']}, this version reads {SCHEMA}: rebuild the shards"
                )
            return cls(
                kind=content["kind"],
                shards=[ShardInfo(**shard) for shard in content["shards"]],
                provenance=content["provenance"],
                stats=content["stats"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a manifest ({error!r}): rebuild the shards or delete it") from None


def find_shards(folder: str | Path, kind: str = "images") -> Manifest:
    """Return the manifest of a folder; a folder of foreign shards (img2dataset) without one is scanned.

    `UserError` when there are no shards, when they are of another kind, or when a file is not as the manifest says.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        _check_files(folder, manifest)
    else:
        manifest = _scan(folder, kind)
    if manifest.samples == 0:
        raise UserError(f"no {'latents' if kind == 'latents' else 'shards'} at '{folder}': {REMEDY[kind]}")
    if manifest.kind != kind:
        raise UserError(f"'{folder}' holds {manifest.kind}, not {kind}: {REMEDY[kind]}")
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shard.name
        if Path(shard.name).name != shard.name:
            raise UserError(f"{folder / MANIFEST}: shard name '{shard.name}' leaves the folder: rebuild the shards")
        if not path.is_file():
            raise UserError(f"shard {path} is missing: rebuild it, or delete {MANIFEST} to use the shards that exist")
        size = path.stat().st_size
        if size != shard.bytes:
            raise UserError(f"shard {path} has {size} bytes, not {shard.bytes} as {MANIFEST} says: rebuild it")


def _scan(folder: Path, kind: str) -> Manifest:
    paths = sorted(folder.glob("[!.]*.tar"))
    if kind == "latents" and paths:
        raise UserError(f"'{folder}' has shards but no {MANIFEST}: {REMEDY['latents']}")
    shards = [
        ShardInfo(name=path.name, samples=len(ShardReader(path)), bytes=path.stat().st_size, sha256="")
        for path in paths
    ]
    return Manifest(kind=kind, shards=shards, provenance={"source": "foreign shards"} if shards else {})

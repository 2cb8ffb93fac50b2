"""COMPLETE: the file, written last, that says what a folder must hold, so that damage is found before it is used."""

import json
from pathlib import Path

from conf.files import sha256

MARKER = "COMPLETE"  # {"files": {name: [bytes, sha256]}}


def damage_of(folder: Path, share: slice = slice(None), needed: str | None = None) -> str | None:
    """What is wrong with the files that the marker lists, None for nothing.

    Args:
        share: of the files, by name, that are read.
        needed: a file without which the marker itself is broken.

    """
    try:
        files = json.loads((folder / MARKER).read_bytes())["files"]
        if needed is not None and needed not in files:
            return f"its {MARKER} does not list {needed}"
        for name in sorted(files)[share]:
            path = folder / name
            if [path.stat().st_size, sha256(path)] != files[name]:
                return f"{name} is not what was written (size or sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    return None

"""Keeps what compilers made between runs, under the hash of all that it was made from.

An entry's name is that hash and the content's own hash, which reveals a damaged file. An entry
appears at once or not at all. If several processes want the same one, one of them makes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Names the folder; without it there is one in the user's cache.
FOLDER = "RESNEST_FUSED_ON_HOST_BUILD"
# Entries that were not used for this long are removed.
KEPT_SECONDS = 30 * 24 * 3600


def folder() -> Path:
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    named = os.environ.get(FOLDER) or Path(users, "resnest_fused", "cuda_on_host")
    return Path(named).absolute()


def get(suffix: str, *made_from: bytes, make: Callable[[Path], None]) -> Path:
    """The entry for ``made_from``, which ``make`` writes if there is no intact one."""
    key = hashlib.sha256()
    for part in made_from:
        key.update(b"%d:%b" % (len(part), part))
    root, name = folder(), key.hexdigest()[:32]
    root.mkdir(parents=True, exist_ok=True)

    def entry_of(path: Path) -> Path:
        return root / f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}{suffix}"

    with _locked(root / f"{name}.lock"):
        for entry in root.glob(f"{name}-*{suffix}"):
            if entry == entry_of(entry):
                os.utime(entry)
                return entry
            entry.unlink()
        handle, unfinished = tempfile.mkstemp(suffix, f"{name}.", root)
        os.close(handle)
        made = Path(unfinished)
        try:
            make(made)
            return made.rename(entry_of(made))
        except BaseException:
            made.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file. The system frees it if the process is killed."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prune() -> None:
    """Remove entries that were not used for long, and what killed processes left unfinished."""
    oldest = time.time() - KEPT_SECONDS
    for path in folder().glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

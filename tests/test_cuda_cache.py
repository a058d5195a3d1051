"""What compilers made is kept: never for another source, never in part, made once by many."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_on_host import cache
from cuda_on_host.build import HERE, Source, build


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache.folder() == Path("/there/resnest_fused/cuda_on_host")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.folder() == Path.home() / ".cache/resnest_fused/cuda_on_host"


def test_a_build_is_of_what_the_source_includes(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "include").mkdir()
    header = tmp_path / "include" / "value.h"
    source = tmp_path / "value.cu"
    source.write_text(
        '#include "value.h"\n'
        'extern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
    )

    def value(number: int, *flags: str) -> tuple[int, Path]:
        header.write_text(f"#define VALUE {number} + MORE\n")
        os.utime(header, (0, 0))  # its time tells nothing
        flags = f"-I{header.parent}", *(flags or ("-DMORE=0",))
        library = build({"plain": [Source(source, flags)]})["plain"]
        return ctypes.CDLL(str(library)).value(), library

    one, library = value(1)
    assert one == 1
    made = {path: path.stat().st_ino for path in folder.glob("*.o")}
    assert value(1) == (1, library)
    assert value(2)[0] == 2
    assert value(2, "-DMORE=7")[0] == 9
    assert value(1) == (1, library)
    assert {path: path.stat().st_ino for path in made} == made  # and nothing was made again

    for path in [library, *made]:  # as a full disk leaves them
        whole = path.read_bytes()
        path.unlink()  # the library is loaded
        path.write_bytes(whole[:1000])
    assert value(1)[0] == 1
    # By the same compiler from the same text: the same names, files that are whole.
    for path in [library, *made]:
        assert path.stat().st_size > 1000


def test_what_failed_is_not_kept(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            cache.get(".o", b"key", make=fail)
    assert cache.get(".o", b"key", make=lambda path: path.write_text("whole")).exists()
    assert [path.read_text() for path in folder.glob("*.o")] == ["whole"]


def test_parts_of_a_key_do_not_run_together() -> None:
    paths = [
        cache.get(".o", *parts, make=lambda path, parts=parts: path.write_bytes(b"|".join(parts)))
        for parts in ((b"a", b"bc"), (b"ab", b"c"), (b"abc",))
    ]
    assert [path.read_bytes() for path in paths] == [b"a|bc", b"ab|c", b"abc"]


# Arguments: a file to which a line goes when it starts to make, and the seconds that it takes.
_MAKE = """
import sys, time
from cuda_on_host import cache
def make(path):
    open(sys.argv[1], "a").write("made\\n")
    path.write_text("half")
    time.sleep(float(sys.argv[2]))
    path.write_text("whole")
print(cache.get(".o", b"key", make=make).read_text())
"""


def _start_making(log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MAKE, str(log), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    options = {"cwd": HERE, "env": environment, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **options)


def test_of_several_processes_one_makes_it(tmp_path: Path) -> None:
    processes = [_start_making(tmp_path / "log", 0.5) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["whole\n"] * 3
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_process_that_was_killed_leaves_nothing_half(tmp_path: Path) -> None:
    log = tmp_path / "log"
    killed = _start_making(log, 1000)
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert _start_making(log, 0).communicate()[0] == "whole\n"
    assert log.read_text() == "made\nmade\n"


def test_what_nobody_wants_goes(folder: Path) -> None:
    old, used = (
        cache.get(".o", key, make=lambda path: path.write_text("it")) for key in (b"old", b"used")
    )
    (folder / "half.o").write_text("left by a killed process")
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    assert cache.get(".o", b"used", make=pytest.fail) == used
    cache.prune()
    assert used.exists() and not old.exists() and not (folder / "half.o").exists()

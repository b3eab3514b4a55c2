from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from baton.engine.kernels.compiled import build
from baton.engine.kernels.compiled.build import CannotCompile, library_path


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A g++ that notes its calls and writes something."""
    script = tmp_path / "bin" / "g++"
    script.parent.mkdir()
    calls = tmp_path / "calls"
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && { echo 1.0; exit; }\n'
        f'echo "$@" >> {calls}\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'echo machine code > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return calls


def test_a_library_is_built_once(tmp_path: Path, compiler: Path) -> None:
    first = library_path(tmp_path / "cache")
    assert first.read_text() == "machine code\n"
    assert library_path(tmp_path / "cache") == first
    assert len(compiler.read_text().splitlines()) == 1
    assert {p.name for p in first.parent.iterdir()} == {first.name, "lock"}


def test_processes_that_start_together_build_once(tmp_path: Path, compiler: Path) -> None:
    threads = [threading.Thread(target=library_path, args=(tmp_path / "c",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler.read_text().splitlines()) == 1


@pytest.mark.usefixtures("compiler")
def test_another_processor_or_flag_gets_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {library_path(tmp_path)}
    monkeypatch.setattr(build, "_processor", lambda: b"another")
    found.add(library_path(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    found.add(library_path(tmp_path))
    assert len(found) == 3


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotCompile, match=r"looked for g\+\+, c\+\+.*install the package g\+\+"):
        library_path(tmp_path)


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo no AVX today >&2; exit 3; }\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CannotCompile, match="status 3:\nno AVX today"):
        library_path(tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.usefixtures("compiler")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(CannotCompile, match="home directory"):
        library_path()


@pytest.mark.usefixtures("compiler")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotCompile, match="folder for compiled kernels"):
        library_path(tmp_path / "file")

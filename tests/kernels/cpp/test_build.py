"""Compiling C++ kernels: once for all processes, whole or not at all, and what is said where it cannot be."""

import os
import subprocess
import sys

import pytest

from headway.kernels.cpp import build

COMPILER = """#!/bin/sh
echo called >> "$(dirname "$0")/calls"
{work}
"""
WRITES = 'for last; do :; done; echo library > "$last"'


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in that counts its calls; it takes the compiler's place, and what it makes is never loaded."""

    def make(work):
        path = tmp_path / "compiler"
        path.write_text(COMPILER.format(work=work))
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        return path

    return make


def calls(compiler):
    return (compiler.parent / "calls").read_text().count("called")


def test_processes_compile_once(compiler, tmp_path):
    made = compiler(WRITES)
    program = (
        "from headway.kernels.cpp import build; command = build._command();"
        "build._compile(command, build._folder() / 'attention-x.so')"
    )
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert calls(made) == 1
    folder = tmp_path / "cache" / "headway"
    assert sorted(p.name for p in folder.iterdir()) == ["attention-x.lock", "attention-x.so"]


def test_a_compiler_that_fails_is_named_with_its_error(compiler):
    compiler("echo 'attention.cpp:7: error: no such thing' >&2; exit 1")
    with pytest.raises(build.CannotBuild, match=r"compiler failed: attention.cpp:7: error: no such thing"):
        build._compile(build._command(), build._folder() / "attention-x.so")
    assert not list(build._folder().glob("*.so"))


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    with pytest.raises(build.CannotBuild, match=r"none: .*No such file"):
        build._compile(build._command(), build._folder() / "attention-x.so")


def test_a_library_that_cannot_be_loaded_is_told_once(compiler):
    compiler(WRITES)
    program = "from headway.kernels.cpp import build; print(build.missing()); assert build.missing()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot be loaded (remove it to compile anew)" in done.stdout
    assert done.stderr.count("UserWarning: C++ kernels for CPUs are not used: ") == 1


def test_a_process_keeps_the_library_it_has(tmp_path):
    """PyTorch ends a process that registers operators twice, as a second library would."""
    program = (
        "import os, shutil; from pathlib import Path; from headway.kernels.cpp import build; build.load();"
        "first = next(build._folder().glob(f'attention-{build._digest(build._command())}.so'));"
        f"os.environ['TORCH_EXTENSIONS_DIR'] = {os.fspath(tmp_path)!r}; build._folder().mkdir();"
        "shutil.copy(first, build._folder()); build.load.cache_clear(); build.load()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_name_says_what_it_was_made_of(monkeypatch):
    names = {build._digest(build._command())}
    monkeypatch.setenv("CXX", "clang++ -O1")
    names.add(build._digest(build._command()))
    monkeypatch.setattr(build.torch, "__version__", "0")
    names.add(build._digest(build._command()))
    assert len(names) == 3


def test_the_folder_is_where_pytorch_has_its_extensions(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build._folder() == tmp_path / "torch_extensions" / "headway"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.fspath(tmp_path / "other"))
    assert build._folder() == tmp_path / "other" / "headway"

"""Unit tests of generated code as an outcome reward. Plain Python, for worker processes.

A program runs in a process of its own, in an empty directory, with limits on time, memory, files and output. That stops
accidents. It is no sandbox: the program has the user's rights and the network, and could read what its judge holds.
"""

import ast
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_SECONDS = 4  # of CPU time; twice that of wall time
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_TAGS = ("", "python", "python3", "py")
# Reads the program and its tests from the directory, and the word to print at the end from its input.
_RUNNER = f"""
import resource
for kind, most in ((resource.RLIMIT_CPU, {_SECONDS}), (resource.RLIMIT_AS, 2**30), (resource.RLIMIT_FSIZE, 2**20)):
    resource.setrlimit(kind, (most, most))
names = {{"__name__": "solution"}}
for name in ("program.py", "tests.py"):
    exec(compile(open(name, encoding="utf-8").read(), name, "exec"), names)
import sys
sys.__stdout__.write(sys.__stdin__.readline())
"""


def code(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the program after the thought passes all tests of the record's field "tests", else 0.

    The program is the last block of Python that defines something; blocks of other languages and of output are skipped.

    Args:
        completion: of the policy.
        prediction: not used: a box cannot hold a program.
        columns: of the question; record["tests"] is Python source, or a list of it, which raises if the program is
            wrong.
    Raises:
        ValueError: the record has no tests.
    """
    tests = columns["record"].get("tests")
    if not tests:
        raise ValueError(f"question {columns.get('id')} has no tests; its record needs a field 'tests'")
    text = completion.decode(errors="replace").rpartition("</think>")[2].replace("\r\n", "\n")
    programs = [block for tag, block in _FENCE.findall(text) if tag.lower() in _TAGS and _defines(block)]
    return float(bool(programs) and passes(programs[-1], "\n".join([tests] if isinstance(tests, str) else tests)))


def _defines(block: str) -> bool:
    """Return whether a block is Python that binds a name."""
    try:
        nodes = ast.parse(block).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign) for n in nodes)


def passes(program: str, tests: str) -> bool:
    """Return whether a program, and then its tests, run to the end within the limits; an early exit does not pass."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as directory:
        for name, text in (("program.py", program), ("tests.py", tests)):
            (Path(directory) / name).write_text(text, encoding="utf-8", errors="replace")
        output = Path(directory) / "output"
        with output.open("wb") as file:
            run = subprocess.Popen(
                [sys.executable, "-I", "-c", _RUNNER], cwd=directory, env={}, stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                run.communicate(word.encode(), timeout=2 * _SECONDS)
            except subprocess.TimeoutExpired:
                return False
            finally:
                # Including what the program started.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)
                run.wait()
        return run.returncode == 0 and output.read_bytes().endswith(word.encode())

"""Unit tests of generated code as an outcome reward. Plain Python, for worker processes.

A program runs in a process of its own, in an empty directory, with limits on time, memory and the size of files. That
stops accidents; it is no sandbox: the program has the user's rights and the network.
"""

import re
import secrets
import subprocess
import sys
import tempfile

_SECONDS = 4  # of CPU time
# The process limits itself first: its CPU time, its memory (1 GiB) and the size of its files (1 MiB).
_LIMITS = f"""
import resource as _r
for _kind, _most in ((_r.RLIMIT_CPU, {_SECONDS}), (_r.RLIMIT_AS, 2**30), (_r.RLIMIT_FSIZE, 2**20)):
    _r.setrlimit(_kind, (_most, _most))
"""
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)\n?```", re.DOTALL)


def code(completion: bytes, prediction: bytes | None, columns: dict) -> float:
    """Return 1 if the last code block after the thought passes all tests of the record's field "tests", else 0.

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
    source = "\n".join([tests] if isinstance(tests, str) else tests)
    blocks = _BLOCK.findall(completion.decode(errors="replace").rpartition("</think>")[2])
    return float(bool(blocks) and passes(blocks[-1], source))


def passes(program: str, tests: str) -> bool:
    """Return whether a program, and then its tests, run to the end within the limits; an early exit does not pass."""
    word = secrets.token_hex(16)  # which the program does not know
    script = f"{_LIMITS}\n{program}\n{tests}\nimport sys as _sys\n_sys.stdout.write({word!r})\n"
    with tempfile.TemporaryDirectory() as directory:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", script], cwd=directory, env={}, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=2 * _SECONDS, start_new_session=True, check=False,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError, OSError):  # a NUL byte, or a text too long for a command line
            return False
    return run.returncode == 0 and run.stdout.decode(errors="replace").endswith(word)

"""Compiled programs: their options on each platform, the cache that later starts reuse, and how many there were."""

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from jax import monitoring

from rpt_jax.config import Config

OFF = "off"
# Bytes of the cache; the programs that were used least recently go first.
_CACHE_SIZE = 16 * 2**30


class Program:
    """A jitted function whose compiler options depend on the platform. It is called and lowered like one of jax.jit."""

    def __init__(self, function: Callable, *, gpu: dict | None = None, **jit_options):
        """
        Args:
            function: to compile.
            gpu: compiler options on GPUs.
            **jit_options: of jax.jit.
        """
        functools.update_wrapper(self, function)
        self._options = {"gpu": gpu or {}}
        self._jit = functools.cache(
            lambda platform: jax.jit(function, **jit_options, compiler_options=self._options.get(platform))
        )

    def options(self, platform: str) -> dict:
        """Return the compiler options on a platform."""
        return self._options.get(platform, {})

    def __call__(self, *args, **kwargs):
        return self._jit(jax.default_backend())(*args, **kwargs)

    def lower(self, *args, platform: str = "", **kwargs):
        """Lower for the platform at hand, or for another one whose options the compiler shall get."""
        return self._jit(platform or jax.default_backend()).lower(*args, **kwargs)


def shapes_of(config: Config) -> str:
    """Return run.shapes, resolved for the platform at hand."""
    return config.run.shapes or ("many" if jax.default_backend() == "cpu" else "few")


def program(**options) -> Callable[[Callable], Program]:
    """Decorate a function as a `Program`."""
    return functools.partial(Program, **options)


def use_cache(directory: str) -> None:
    """Keep compiled programs on disk, unless JAX has a cache directory already.

    Args:
        directory: of the cache; empty: rpt_jax in the user's cache directory; OFF: none.
    """
    if directory == OFF or jax.config.jax_compilation_cache_dir:
        return
    if not directory:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpt_jax"
    jax.config.update("jax_compilation_cache_dir", str(Path(directory) / _processor()))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_max_size", _CACHE_SIZE)


def _processor() -> str:
    """Return a name of this machine's processor: programs for one may not run on another that shares the directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    except OSError:
        facts = []
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


@dataclass
class Compilations:
    """Programs compiled by this process so far.

    Attributes:
        programs: compiled, or read from the cache.
        from_cache: read from the cache.
        seconds: of both.
    """

    programs: int = 0
    from_cache: int = 0
    seconds: float = 0.0

    def since(self, before: "Compilations") -> "Compilations":
        """Return those since an earlier count."""
        return Compilations(
            self.programs - before.programs, self.from_cache - before.from_cache, self.seconds - before.seconds
        )


_COUNTS = Compilations()


def compilations() -> Compilations:
    """Return the counts so far."""
    return Compilations(**vars(_COUNTS))


def _count_event(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _COUNTS.from_cache += 1


def _count_duration(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COUNTS.programs += 1
        _COUNTS.seconds += seconds


monitoring.register_event_listener(_count_event)
monitoring.register_event_duration_secs_listener(_count_duration)

"""Compiled programs: their options on each platform, the cache that later starts reuse, and how many there were."""

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax import monitoring

from rpt_jax.config import Config
from rpt_jax.errors import ConfigError

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

    def lower(self, *args, **kwargs):
        """Lower for given arguments. To compile for another platform, pass its `options` to the compiler."""
        return self._jit(jax.default_backend()).lower(*args, **kwargs)


# A compiled program takes some 120 memory maps, and Linux allows a process 65,530: a dozen runs in one would crash.
_MOST_MAPS = 30_000


def drop_programs_if_many() -> None:
    """Drop the compiled programs of this process if they take too many memory maps; the cache on disk keeps them."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()


def program_shapes(config: Config) -> str:
    """Return run.shapes, many or few, resolved for the platform at hand."""
    return config.run.shapes or ("few" if jax.default_backend() == "gpu" else "many")


def program(**options) -> Callable[[Callable], Program]:
    """Decorate a function as a `Program`."""
    return functools.partial(Program, **options)


def use_cache(directory: str) -> None:
    """Keep compiled programs on disk, unless JAX has a cache directory already.

    Args:
        directory: of the cache; empty: rpt_jax in the user's cache directory, if it can be written; OFF: none.
    Raises:
        ConfigError: a directory that cannot be written.
    """
    if directory == OFF or jax.config.jax_compilation_cache_dir:
        return
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rpt_jax"
    path = (Path(directory) if directory else users) / _processor()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        if directory:
            raise ConfigError(
                f"run.compilation_cache={directory!r} cannot be written ({error}). Choose another directory, or off."
            ) from error
        warnings.warn(f"compiled programs are not kept for later starts: {error}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
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


@contextmanager
def needs_memory(what: str, settings: str) -> Iterator[None]:
    """Name the settings to lower if the device runs out of memory; also a decorator.

    Args:
        what: needs the memory.
        settings: flags that lower it.
    Raises:
        ConfigError: instead of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"{what} ran out of the device's memory ({str(error).splitlines()[0]:.200}). Lower {settings}."
        ) from error


@dataclass
class Compilations:
    """Programs compiled by this process.

    Attributes:
        programs: compiled, or read from the cache.
        from_cache: read from the cache.
        seconds: of both.
    """

    programs: int = 0
    from_cache: int = 0
    seconds: float = 0.0


_COUNTS = Compilations()


def take_compilations() -> Compilations:
    """Return the counts since the last call, or since the start of the process."""
    taken = Compilations(**vars(_COUNTS))
    _COUNTS.__init__()
    return taken


def _count_event(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _COUNTS.from_cache += 1


def _count_duration(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COUNTS.programs += 1
        _COUNTS.seconds += seconds


monitoring.register_event_listener(_count_event)
monitoring.register_event_duration_secs_listener(_count_duration)

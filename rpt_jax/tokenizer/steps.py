"""Where the steps of a thought end: at a delimiter of bytes, which may span tokens, after k tokens, or at marks."""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from rpt_jax.config import StepsConfig
from rpt_jax.errors import ConfigError
from rpt_jax.tokenizer.vocabulary import Tokenizer


@dataclass(frozen=True)
class StepRule:
    """Finds the tokens at which steps end; the last token of a completion always ends one.

    A delimiter directly behind another one, with nothing but its own bytes between them, belongs to the same step.

    Attributes:
        config: which of the three rules.
        tokenizer: of the tokens.
    """

    config: StepsConfig
    tokenizer: Tokenizer

    def __post_init__(self):
        for mark in self.config.marks:
            if len(self.tokenizer.encode_continuation(mark, specials=True)) != 1:
                raise ConfigError(
                    f"steps.marks has {mark!r}, which the tokenizer spells as several tokens; a mark must be one. Use "
                    "--steps.delimiter for text."
                )

    @property
    def delimiter(self) -> str:
        """Return the delimiter as text."""
        return self.config.delimiter.replace("\\n", "\n")

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return an automaton over tokens: (next state i32 [S, V], whether a step ends there bool [S, V]).

        State 2 j + c: the first j bytes of the delimiter were just read; c is 1 if the step has bytes of its own.
        """
        V = self.tokenizer.vocab_size
        if self.config.marks:
            ends = np.zeros((1, V), bool)
            ends[0, [self.tokenizer.encode_continuation(m, specials=True)[0] for m in self.config.marks]] = True
            return np.zeros((1, V), np.int32), ends
        mark = self.delimiter.encode()
        fallback = _fallbacks(mark)
        states, ends = np.zeros((2 * len(mark), V), np.int32), np.zeros((2 * len(mark), V), bool)
        for token in range(V):
            text = self.tokenizer.token_bytes(token)
            for state in range(len(states)):
                states[state, token], ends[state, token] = _read(mark, fallback, state, text)
        return states, ends

    def ends(self, tokens) -> list[int]:
        """Return the indices of the tokens at which the steps of one completion end."""
        if not len(tokens):
            return []
        found, state = [], 0
        if self.config.every_tokens:
            found = list(range(self.config.every_tokens - 1, len(tokens), self.config.every_tokens))
        else:
            states, ends = self.table
            for place, token in enumerate(tokens):
                if ends[state, token]:
                    found.append(place)
                state = states[state, token]
        return found if found and found[-1] == len(tokens) - 1 else [*found, len(tokens) - 1]

    def ends_of_rows(self, tokens_URC, mask_URC):
        """Return bool [U, R, C], True at the real tokens at which steps end; inside or outside of a jitted function."""
        C = tokens_URC.shape[-1]
        places = jnp.arange(C)
        is_last = mask_URC & ~jnp.pad(mask_URC[..., 1:], ((0, 0), (0, 0), (0, 1)))
        if self.config.every_tokens:
            return mask_URC & (((places + 1) % self.config.every_tokens == 0) | is_last)
        return mask_URC & (_ended(*self.table, tokens_URC) | is_last)


@jax.jit
def _ended(states_SV, ends_SV, tokens_URC):
    """Run the automaton over rows; return whether a step ends at each token."""

    def step(state_UR, token_UR):
        return states_SV[state_UR, token_UR], ends_SV[state_UR, token_UR]

    _, found = jax.lax.scan(step, jnp.zeros(tokens_URC.shape[:2], jnp.int32), jnp.moveaxis(tokens_URC, -1, 0))
    return jnp.moveaxis(found, 0, -1)


def _fallbacks(mark: bytes) -> list[int]:
    """Return for each j the longest proper suffix of the first j bytes that also begins the delimiter (KMP)."""
    found = [0] * (len(mark) + 1)
    for j in range(1, len(mark)):
        k = found[j]
        while k and mark[k] != mark[j]:
            k = found[k]
        found[j + 1] = k + (mark[k] == mark[j])
    return found


def _read(mark: bytes, fallback: list[int], state: int, text: bytes) -> tuple[int, bool]:
    """Return (state after the bytes of a token, whether a step ended among them)."""
    j, has_own, has_ended = state // 2, state % 2, False
    for byte in text:
        while j and mark[j] != byte:
            # The first bytes of the match turn out to be the step's own.
            j, has_own = fallback[j], 1
        if mark[j] == byte:
            j += 1
        else:
            has_own = 1
        if j == len(mark):
            has_ended |= bool(has_own)
            j, has_own = 0, 0
    return 2 * j + has_own, has_ended


def places_of_bytes(lengths: np.ndarray, ends: list[int]) -> list[int]:
    """Return the token that holds the last byte before each offset.

    Args:
        lengths: bytes of each token.
        ends: byte offsets, at least 1 and at most the sum of the lengths.
    """
    return np.searchsorted(np.cumsum(lengths), ends).tolist()

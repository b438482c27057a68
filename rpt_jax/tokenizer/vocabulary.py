"""Token ids to exact bytes: the one place that knows how a tokenizer spells its vocabulary.

The reward compares bytes, so each id needs the bytes it stands for in running text. They come from the vocabulary
entry itself, never from `decode([id])`: half of a UTF-8 character decodes to U+FFFD and loses its bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import transformers

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import chat
from rpt_jax.tokenizer.formats import byte_level_alphabet

# The marks that thoughts and answers are read by.
THINK_OPEN, THINK_CLOSE, BOX_OPEN = "<think>", "</think>", "\\boxed{"
_PROBE = "It's 3.14  {x}\n\tna\u00efve \u6570\u5b66 \U0001f600"
_FALLBACK_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Tokenizer:
    """A transformers tokenizer and the bytes of its ids.

    Attributes:
        vocab_size: highest id plus one, added tokens included.
        bos_id: id that starts every sequence, or None where the tokenizer adds none.
        eos_id: id that ends a completion.
        unk_id: id that stands for text outside the vocabulary, or None where every text can be spelt.
    """

    def __init__(self, backend: transformers.PreTrainedTokenizerFast, *, where: str):
        self._backend = backend
        self._where = where
        if backend.eos_token_id is None:
            raise DataError(
                f"tokenizer {where} has no end-of-sequence token; completions must be able to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        if self._description["model"].get("type") == "WordPiece":
            raise DataError(
                f"tokenizer {where} is WordPiece, which does not keep spaces; the bytes of tokens must join to the "
                "text. Byte-level BPE, SentencePiece and tiktoken vocabularies do; use one of these."
            )
        self.vocab_size = 1 + max(backend.get_vocab().values())  # ids may have gaps
        model = self._description["model"]
        unknown = model.get("unk_token")
        self.unk_id = model.get("unk_id") if unknown is None else backend.backend_tokenizer.token_to_id(unknown)
        self.eos_id = int(backend.eos_token_id)
        # What the tokenizer itself puts before a text.
        first = backend("", add_special_tokens=True)["input_ids"][:1]
        self.bos_id = int(first[0]) if first and first[0] != self.eos_id else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        return (self.eos_id,)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of `text`, no special tokens added.

        Args:
            specials: read special tokens that `text` spells as such, as templates need. False: they are ordinary text,
                so that no document loses bytes or gains a control token.
        """
        self._read_specials(specials)
        return self._backend.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        self._read_specials(False)
        return [e.ids for e in self._backend.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _read_specials(self, specials: bool) -> None:
        self._backend.backend_tokenizer.encode_special_tokens = not specials

    @cached_property
    def adds_space(self) -> bool:
        """SentencePiece puts a space before a first word."""
        return self._join(self.encode("a")).startswith(b" ")

    def encode_continuation(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of `text` where it follows other text: without the space that SentencePiece puts before a first word."""
        ids = self.encode(text, specials=specials)
        if not self.adds_space or self._join(ids) == text.encode():
            return ids
        # Encode behind a newline, then drop the tokens that spell the space and the newline.
        behind = self.encode("\n" + text, specials=specials)
        for count in range(1, len(behind)):
            if self._join(behind[:count]) == b" \n":
                return behind[count:]
        raise DataError(
            f"tokenizer {self._where} cannot spell {text!r} without a leading space; prompts need that. Use another."
        )

    def _join(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: their bytes as UTF-8, special tokens left out, invalid bytes as U+FFFD."""
        return self._join(int(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that `token_id` stands for in running text; b"" for special tokens.

        Raises:
            DataError: token_id is not in [0, vocab_size).
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(
                f"token id {token_id}; tokenizer {self._where} has ids 0 to {self.vocab_size - 1}. "
                "Use the tokenizer that made these ids."
            )
        return self._bytes[token_id]

    def byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids' bytes as arrays: u8 [V, W] zero-padded, W the longest token's bytes; i32 [V] lengths."""
        return self._byte_table

    @cached_property
    def _byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(b) for b in self._bytes], np.int32)
        table = np.zeros((self.vocab_size, max(1, lengths.max())), np.uint8)
        for token_id, token in enumerate(self._bytes):
            table[token_id, : len(token)] = np.frombuffer(token, np.uint8)
        return table, lengths

    def chat_parts(self) -> tuple[str, str]:
        """Text that the chat template puts before and after one user message.

        Raises:
            DataError: the tokenizer has no chat template, or it does not keep the message intact.
        """
        return chat.parts(self._render, self._where)

    def chat_prompt(self, messages: list[tuple[str, str]]) -> list[int]:
        """Ids of the conversation up to the end of its last message; what follows is `chat_parts()[1]`.

        Special tokens are the template's alone: what a message spells like one is text.

        Raises:
            DataError: as `chat_parts`, or the template's end depends on the conversation.
        """
        ids: list[int] = []
        for text, is_message in chat.pieces(self._render, messages, self._where):
            ids += self.encode(text, specials=not is_message) if text or is_message else []
        return ids

    def _render(self, messages: list[tuple[str, str]]) -> str:
        text = chat.render(self._backend, messages, self._where)
        # The template's own BOS would stand twice: the trunk puts it first.
        return text if self.bos_id is None else text.removeprefix(self._backend.convert_ids_to_tokens(self.bos_id))

    def check_bytes(self) -> None:
        """Spell a probe text and compare the tokens' bytes with it, after the tokenizer's own normalisation.

        Raises:
            DataError: they differ, as with WordPiece, which keeps no spaces.
        """
        ids = self.encode(_PROBE)
        if self.unk_id is not None and self.unk_id in ids:
            return  # a vocabulary without byte fallback; documents that it cannot spell are refused one by one
        if (spelled := self.misspelled(_PROBE, ids)) is not None:
            raise DataError(
                f"tokenizer {self._where} spells {_PROBE!r} with tokens of bytes {spelled!r}; the bytes of tokens must "
                "join to the text. Byte-level BPE, SentencePiece and tiktoken vocabularies do; use one of these."
            )

    def misspelled(self, text: str, ids: list[int]) -> bytes | None:
        """The bytes of `ids` where they are not those of `text` after the tokenizer's own normalisation, else None.

        A space before the text does not count.
        """
        normalizer = self._backend.backend_tokenizer.normalizer
        expected = text if normalizer is None else normalizer.normalize_str(text).replace("\u2581", " ")
        spelled = self._join(ids)
        return None if spelled.removeprefix(b" ") == expected.encode().removeprefix(b" ") else spelled

    def save(self, directory: str | Path) -> None:
        self._backend.save_pretrained(str(directory))

    @cached_property
    def _description(self) -> dict:
        return json.loads(self._backend.backend_tokenizer.to_str())

    @cached_property
    def encoding_fingerprint(self) -> str:
        """sha256 over how text becomes ids: vocabulary, merges, normalisation, splitting."""
        parts = {name: self._description.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "big") + token)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the encoding and the special ids: what tokens, rewards and prompts depend on."""
        return hashlib.sha256(repr((self.bos_id, self.eos_id, self.encoding_fingerprint)).encode()).hexdigest()

    def unspeakable(self, text: str) -> str | None:
        """A piece of `text` that a unigram vocabulary would take for a control token or a byte; None: there is none."""
        found = self._reserved.search(text) if self._reserved else None
        return found[0] if found else None

    @cached_property
    def _reserved(self) -> re.Pattern | None:
        if self._description["model"].get("type") != "Unigram":
            return None
        control = [re.escape(t.content) for t in self._backend.added_tokens_decoder.values() if t.special]
        return re.compile("|".join([r"<0x[0-9A-F]{2}>", *control]))

    @cached_property
    def _bytes(self) -> list[bytes]:
        entries = self._backend.convert_ids_to_tokens(list(range(self.vocab_size)))
        added = self._backend.added_tokens_decoder
        spell = _speller(self._description)
        table = []
        for token_id, entry in enumerate(entries):
            if token_id in added:
                table.append(b"" if added[token_id].special else added[token_id].content.encode())
            else:
                table.append(b"" if entry is None else spell(entry))
        return table


def _speller(description: dict):
    """How this tokenizer's vocabulary strings spell bytes: byte-level, byte fallback with U+2581, or plain text."""
    parts = json.dumps([description.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")])
    if '"ByteLevel"' in parts:
        return _spell_byte_level
    if description["model"].get("byte_fallback") or "\\u2581" in parts:
        return _spell_sentencepiece
    return lambda entry: entry.encode()


_BYTE_LEVEL = byte_level_alphabet()


def _spell_byte_level(entry: str) -> bytes:
    return bytes(_BYTE_LEVEL[c] for c in entry) if all(c in _BYTE_LEVEL for c in entry) else entry.encode()


def _spell_sentencepiece(entry: str) -> bytes:
    fallback = _FALLBACK_BYTE.match(entry)
    return bytes([int(fallback[1], 16)]) if fallback else entry.replace("\u2581", " ").encode()

"""Token ids to exact bytes: the one place that knows how a tokenizer spells its vocabulary.

The reward compares bytes, so each id needs the bytes it stands for in running text. They come from the vocabulary
entry itself, never from `decode([id])`: half of a UTF-8 character decodes to U+FFFD and loses its bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that PyTorch is absent; none is needed
import transformers

from rpt_jax.errors import DataError

THINK_OPEN, THINK_CLOSE, BOX_OPEN = "<think>", "</think>", "\\boxed{"
_FALLBACK_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Tokenizer:
    """A transformers tokenizer and the bytes of its ids.

    Attributes:
        vocab_size: number of ids, added tokens included.
        bos_id: id that starts every sequence, or None where the tokenizer adds none.
        eos_id: id that ends a completion.
        unk_id: id that stands for text outside the vocabulary, or None where every text can be spelt.
    """

    def __init__(self, backend: transformers.PreTrainedTokenizerFast, *, where: str, add_bos: bool | None = None):
        self._backend = backend
        self._where = where
        if backend.eos_token_id is None:
            raise DataError(
                f"tokenizer {where} has no end-of-sequence token; completions must be able to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        if add_bos is None:
            add_bos = backend.bos_token_id in backend("", add_special_tokens=True)["input_ids"]
        self.vocab_size = len(backend)
        unknown = getattr(backend.backend_tokenizer.model, "unk_token", None)
        self.unk_id = None if unknown is None else backend.backend_tokenizer.token_to_id(unknown)
        self.eos_id = int(backend.eos_token_id)
        self.bos_id = int(backend.bos_token_id) if add_bos and backend.bos_token_id is not None else None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, no special tokens added."""
        return self._backend.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` where it follows other text: without the space that SentencePiece puts before a first word."""
        ids, wanted = self.encode(text), text.encode()
        if len(b"".join(self.token_bytes(i) for i in ids)) == len(wanted):
            return ids
        # Encode behind a newline, then drop the tokens that spell it and the space before it.
        behind = self.encode("\n" + text)
        surplus = sum(len(self.token_bytes(i)) for i in behind) - len(wanted)
        for count, token_id in enumerate(behind):
            if surplus == 0:
                return behind[count:]
            surplus -= len(self.token_bytes(token_id))
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: their bytes as UTF-8, special tokens left out, invalid bytes as U+FFFD."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

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
        if not self._backend.chat_template:
            raise DataError(
                f"tokenizer {self._where} has no chat template, which data.chat=True needs. "
                "Set --data.no-chat or use a chat model's tokenizer."
            )
        message = "\u27e6message\u27e7"
        text = self._backend.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        if text.count(message) != 1:
            raise DataError(
                f"the chat template of tokenizer {self._where} repeats or drops the user message ({text!r}); "
                "it must show it once. Set --data.no-chat."
            )
        before, after = text.split(message)
        # The template's own BOS would stand twice: the trunk puts it first.
        if self.bos_id is not None:
            before = before.removeprefix(self._backend.bos_token)
        return before, after

    def save(self, directory: str | Path) -> None:
        self._backend.save_pretrained(str(directory))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every id's bytes and the special ids: what rewards and prompts depend on."""
        digest = hashlib.sha256(repr((self.bos_id, self.eos_id)).encode())
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "big") + token)
        return digest.hexdigest()

    @cached_property
    def _bytes(self) -> list[bytes]:
        entries = self._backend.convert_ids_to_tokens(list(range(self.vocab_size)))
        added = self._backend.added_tokens_decoder
        spell = _speller(json.loads(self._backend.backend_tokenizer.to_str()))
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


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted. Source: openai/gpt-2 src/encoder.py bytes_to_unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


def _spell_byte_level(entry: str) -> bytes:
    return bytes(_BYTE_LEVEL[c] for c in entry) if all(c in _BYTE_LEVEL for c in entry) else entry.encode()


def _spell_sentencepiece(entry: str) -> bytes:
    fallback = _FALLBACK_BYTE.match(entry)
    return bytes([int(fallback[1], 16)]) if fallback else entry.replace("\u2581", " ").encode()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer directory: tokenizer.json, a SentencePiece tokenizer.model, or vocab.json + merges.txt.

    Nothing in the directory is executed.

    Raises:
        DataError: the directory is missing, holds none of these, or does not parse.
    """
    directory = Path(path)
    has = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        if "tokenizer.json" in has and "tokenizer_config.json" in has:
            backend = transformers.AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
            return Tokenizer(backend, where=str(directory))
        if "tokenizer.json" in has:
            return Tokenizer(_fast(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))), where=str(path))
        if "tokenizer.model" in has:
            backend = transformers.LlamaTokenizer.from_pretrained(str(directory), local_files_only=True)
            return Tokenizer(backend, where=str(directory), add_bos=True)
        if {"vocab.json", "merges.txt"} <= has:
            backend = tokenizers.ByteLevelBPETokenizer.from_file(
                str(directory / "vocab.json"), str(directory / "merges.txt")
            )
            return Tokenizer(_fast(tokenizers.Tokenizer.from_str(backend.to_str())), where=str(path))
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to a bare Exception on a damaged file
        raise DataError(f"tokenizer {directory} does not load ({error}); replace the damaged file.") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    raise DataError(
        f"no tokenizer in {directory} (found {sorted(has)[:8]}); it must hold tokenizer.json, tokenizer.model or "
        "vocab.json with merges.txt. Check data.tokenizer."
    )


_EOS_CANDIDATES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")


def _fast(backend: tokenizers.Tokenizer) -> transformers.PreTrainedTokenizerFast:
    """Wrap a bare tokenizer; its end token is the first conventional one in its vocabulary."""
    eos = next((t for t in _EOS_CANDIDATES if backend.token_to_id(t) is not None), None)
    if eos is not None:
        backend.add_special_tokens([eos])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def train_byte_level(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with the think marks as tokens, for corpora that come without a tokenizer."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    marks = [tokenizers.AddedToken(m, special=False, normalized=False) for m in (THINK_OPEN, THINK_CLOSE, BOX_OPEN)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(marks)
    return Tokenizer(_fast(backend), where="trained on the corpus")


def word_level(entries: list[str]) -> Tokenizer:
    """A closed vocabulary whose entries are their own text: words with their leading space, digits, marks.

    Text that is not made of the entries encodes to `<unk>`.
    """
    vocab = {entry: i for i, entry in enumerate(["<eos>", "<unk>", *entries])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = sorted(entries, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(re.escape(e) for e in longest_first))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>", "<unk>"])
    return Tokenizer(_fast(backend), where="closed vocabulary")

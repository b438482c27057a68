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
import tokenizers
import transformers

from rpt_jax.errors import DataError
from rpt_jax.tokenizer_formats import byte_level_alphabet, is_tiktoken, read_sentencepiece, read_tiktoken

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
        message = "\u27e6message\u27e7"
        text = self._render([("user", message)])
        if text.count(message) != 1:
            raise DataError(
                f"the chat template of tokenizer {self._where} repeats or drops the user message ({text!r}); "
                "it must show it once. Set --data.no-chat."
            )
        before, after = text.split(message)
        return before, after

    def chat_prompt(self, messages: list[tuple[str, str]]) -> list[int]:
        """Ids of the conversation up to the end of its last message; what follows is `chat_parts()[1]`.

        Special tokens are the template's alone: what a message spells like one is text.

        Raises:
            DataError: as `chat_parts`, or the template's end depends on the conversation.
        """
        marks = [f"\u27e6{number}\u27e7" for number in range(len(messages))]
        text = self._render([(role, mark) for (role, _), mark in zip(messages, marks)])
        after = self.chat_parts()[1]
        if not text.endswith(marks[-1] + after) or any(text.count(mark) != 1 for mark in marks):
            raise DataError(
                f"the chat template of tokenizer {self._where} renders {[r for r, _ in messages]} as {text!r:.200}; "
                f"each message must stand in it once and the last be followed by {after!r}. Set --data.no-chat."
            )
        ids: list[int] = []
        for (_, content), mark in zip(messages, marks):
            before, text = text.split(mark)
            ids += (self.encode(before, specials=True) if before else []) + self.encode(content)
        return ids

    def _render(self, messages: list[tuple[str, str]]) -> str:
        if not self._backend.chat_template:
            raise DataError(
                f"tokenizer {self._where} has no chat template, which data.chat=True needs. "
                "Set --data.no-chat or use a chat model's tokenizer."
            )
        try:
            text = self._backend.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # a template raises whatever Jinja or the template itself raises
            raise DataError(
                f"the chat template of tokenizer {self._where} fails on roles {[r for r, _ in messages]} ({error}). "
                "Set --data.no-chat, or use other messages."
            ) from error
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer directory.

    In this order: tokenizer.json, tokenizer.model (SentencePiece or tiktoken), a .tiktoken file, vocab.json with
    merges.txt. Nothing in the directory is executed.

    Raises:
        DataError: the directory is missing, holds none of these, does not parse, or spells text in a way whose bytes
            cannot be told exactly.
    """
    directory = Path(path)
    has = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = _read(directory, has)
        if tokenizer is not None:
            tokenizer.check_bytes()
    except DataError:
        raise
    except Exception as error:  # the libraries raise anything from OSError to a bare Exception on a damaged file
        raise DataError(f"tokenizer {directory} does not load ({error}); replace the damaged file.") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if tokenizer is None:
        raise DataError(
            f"no tokenizer in {directory} (found {has[:8]}); it must hold tokenizer.json, tokenizer.model, a .tiktoken "
            "file, or vocab.json with merges.txt. Check data.tokenizer."
        )
    return tokenizer


def _read(directory: Path, has: list[str]) -> Tokenizer | None:
    where, configured = str(directory), _configured(directory / "tokenizer_config.json")
    if "tokenizer.json" in has and "tokenizer_config.json" in has:
        backend = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, local_files_only=True)
        return Tokenizer(backend, where=where)
    if "tokenizer.json" in has:
        return Tokenizer(_fast(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))), where=where)
    tiktoken = [directory / name for name in has if name.endswith(".tiktoken")]
    if "tokenizer.model" in has:
        if not is_tiktoken(directory / "tokenizer.model"):
            backend, special = read_sentencepiece(directory / "tokenizer.model")
            return Tokenizer(_fast(backend, special | configured), where=where)
        tiktoken.insert(0, directory / "tokenizer.model")
    if tiktoken:
        return Tokenizer(_fast(read_tiktoken(tiktoken[0]), configured), where=where)
    if {"vocab.json", "merges.txt"} <= set(has):
        backend = tokenizers.ByteLevelBPETokenizer.from_file(
            str(directory / "vocab.json"), str(directory / "merges.txt")
        )
        return Tokenizer(_fast(tokenizers.Tokenizer.from_str(backend.to_str()), configured), where=where)
    return None


def _configured(path: Path) -> dict[str, str]:
    """The special tokens and the chat template that a tokenizer_config.json names."""
    if not path.exists():
        return {}
    config = json.loads(path.read_text())
    names = ("bos_token", "eos_token", "unk_token", "chat_template")
    values = {name: config.get(name) for name in names}
    # A token is a string, or an object with its content.
    values = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: v for name, v in values.items() if isinstance(v, str)}


_EOS_CANDIDATES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")


def _fast(backend: tokenizers.Tokenizer, special: dict[str, str] | None = None) -> transformers.PreTrainedTokenizerFast:
    """Wrap a bare tokenizer; unless `special` says so, its end token is the first conventional one it has."""
    special = dict(special or {})
    if "eos_token" not in special:
        control = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        present = [t for t in _EOS_CANDIDATES if backend.token_to_id(t) is not None]
        # A large vocabulary may spell </s> as ordinary text.
        eos = next((t for t in present if t in control), present[0] if present else None)
        special["eos_token"] = eos
        if eos is not None:
            backend.add_special_tokens([eos])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


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

"""Token ids and their exact bytes.

The reward compares bytes, so each id needs the bytes that it stands for in running text. They come from the vocabulary
entry, never from `decode([id])`: half of a UTF-8 character decodes to U+FFFD and loses its bytes.
"""

import codecs
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from rpt_jax.errors import DataError
from rpt_jax.tokenizer import chat
from rpt_jax.tokenizer.formats import byte_level_alphabet
from rpt_jax.tokenizer.stops import find_stop_ids

# Marks around thoughts and answers.
THINK_OPEN, THINK_CLOSE, BOX_OPEN = "<think>", "</think>", "\\boxed{"
# Files that a tokenizer is read from.
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_PROBE = "It's 3.14  {x}\n\tna\u00efve \u6570\u5b66 \U0001f600"
_FALLBACK_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


class Tokenizer:
    """A transformers tokenizer and the bytes of its ids.

    Attributes:
        vocab_size: highest id plus one, added tokens included.
        bos_id: id that starts every sequence, or None if the tokenizer adds none.
        eos_id: id that ends a completion.
        chat_options: variables of the chat template, such as its switches.
        chat_date: that the chat template writes; None: the current one.
        unk_id: id of text outside the vocabulary, or None if the vocabulary can spell any text.
    """

    def __init__(self, backend: transformers.PreTrainedTokenizerFast, *, where: str, adds_bos: bool | None = None):
        """
        Args:
            backend: with its special tokens and chat template.
            where: directory of its files, or a name for messages.
            adds_bos: whether texts start with bos_token; None: as the tokenizer's pipeline does.
        """
        self._backend = backend
        self._where = where
        self.chat_options: dict[str, Any] = {}
        self.chat_date: datetime | None = None
        if backend.eos_token_id is None:
            raise DataError(
                f"tokenizer {where} has no end-of-sequence token; completions must be able to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        if self._description["model"].get("type") == "WordPiece":
            raise DataError(
                f"tokenizer {where} is WordPiece, which drops spaces; the bytes of tokens must join to the "
                "text. Use a byte-level BPE, SentencePiece or tiktoken vocabulary."
            )
        self.vocab_size = 1 + max(backend.get_vocab().values())  # ids may have gaps
        model = self._description["model"]
        unknown = model.get("unk_token")
        self.unk_id = model.get("unk_id") if unknown is None else backend.backend_tokenizer.token_to_id(unknown)
        self.eos_id = int(backend.eos_token_id)
        if adds_bos is None:
            # The token that the tokenizer puts before a text.
            first = backend("", add_special_tokens=True)["input_ids"][:1]
            self.bos_id = int(first[0]) if first and first[0] != self.eos_id else None
        elif adds_bos and backend.bos_token_id is None:
            raise DataError(f"tokenizer {where} has add_bos_token and no bos_token. Name it in tokenizer_config.json.")
        else:
            self.bos_id = int(backend.bos_token_id) if adds_bos else None

    @property
    def pad_id(self) -> int | None:
        """Id of padding; None: there is none, or it is the end token, which a text may hold."""
        pad = self._backend.pad_token_id
        return None if pad is None or int(pad) == self.eos_id else int(pad)

    @cached_property
    def stop_sources(self) -> dict[int, list[str]]:
        """Ids that end a completion, and who says so: {id: sources}; see `stops.find_stop_ids`."""
        directory = Path(self._where)
        return find_stop_ids(self, directory if directory.is_dir() else None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, the tokenizer's end token first."""
        return tuple(self.stop_sources)

    def entry(self, token_id: int) -> str:
        """Return the vocabulary's text of an id, special tokens included; for messages."""
        return str(self._backend.convert_ids_to_tokens(int(token_id)))

    def turn_end(self) -> int | None:
        """Return the special token that the chat template puts after the assistant's message, or None."""
        mark = "\u27e6answer\u27e7"
        try:
            text = self._render([("user", "?"), ("assistant", mark)], opens_turn=False)
        except DataError:
            return None
        ids = self.encode(text.rpartition(mark)[2].lstrip(), specials=True) if mark in text else []
        return ids[0] if ids and ids[0] in self._backend.added_tokens_decoder else None

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Encode `text`, without adding special tokens.

        Args:
            text: any string.
            specials: special tokens in `text` become control tokens, as templates need. False: they are ordinary text,
                so that no document loses bytes or gains a control token.
        """
        backend = self._backend.backend_tokenizer if specials else self._plain
        backend.encode_special_tokens = not specials
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts at once."""
        self._plain.encode_special_tokens = True
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The pipeline for text. Tokens of the chat template are text in it, even those that are not marked special."""
        template = self._backend.chat_template or ""
        template = template if isinstance(template, str) else json.dumps(template)
        of_template = {
            token.content
            for token in self._backend.added_tokens_decoder.values()
            if not token.special and token.content in template and token.content in self._token_names
        }
        if not of_template:
            return self._backend.backend_tokenizer
        # Special tokens can be read as text; leaving a token out would move the ids of others.
        added = [
            t | {"special": t["special"] or t["content"] in of_template} for t in self._description["added_tokens"]
        ]
        return tokenizers.Tokenizer.from_str(json.dumps(self._description | {"added_tokens": added}))

    @cached_property
    def adds_space(self) -> bool:
        """Return whether the tokenizer adds a space before the first word, as SentencePiece does."""
        return self._join(self.encode("a")).startswith(b" ")

    def encode_continuation(self, text: str, *, specials: bool = False) -> list[int]:
        """Encode `text` as a continuation, without the space that SentencePiece adds before a first word.

        Raises:
            DataError: the tokenizer cannot spell it without that space.
        """
        ids = self.encode(text, specials=specials)
        if not self.adds_space or self._join(ids) == text.encode():
            return ids
        # Encode after a newline, then drop the tokens that spell the space and the newline.
        behind = self.encode("\n" + text, specials=specials)
        for count in range(1, len(behind)):
            if self._join(behind[:count]) == b" \n":
                return behind[count:]
        raise DataError(
            f"tokenizer {self._where} cannot spell {text!r} without a leading space; prompts must not add a space. "
            "Use another tokenizer."
        )

    def _join(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`: their bytes as UTF-8, without special tokens; invalid bytes become U+FFFD."""
        return self._join(int(i) for i in ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id; joined, the texts are `decode(ids)`.

        A character whose bytes are spread over several ids is in the text of the last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = len(ids) - 1
        return [decoder.decode(self.token_bytes(int(i)), final=number == last) for number, i in enumerate(ids)]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that `token_id` stands for in running text; b"" for special tokens.

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
        """Return the bytes of all ids u8 [V, W], zero-padded to the longest token, and their lengths i32 [V]."""
        return self._byte_table

    @cached_property
    def _byte_table(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(b) for b in self._bytes], np.int32)
        table = np.zeros((self.vocab_size, max(1, lengths.max())), np.uint8)
        for token_id, token in enumerate(self._bytes):
            table[token_id, : len(token)] = np.frombuffer(token, np.uint8)
        return table, lengths

    def chat_parts(self) -> tuple[str, str]:
        """Return the text that the chat template puts before and after a single user message.

        Raises:
            DataError: the tokenizer has no chat template, or the template changes the message.
        """
        return chat.parts(self._render, self._where)

    def chat_prompt(self, messages: list[tuple[str, str]]) -> list[int]:
        """Encode a conversation up to the end of its last message; `chat_parts()[1]` follows it.

        The bytes are those of the text that the template renders. Only the template can produce control tokens: in a
        message, their names are text.

        Raises:
            DataError: as `chat_parts`; the end of the template depends on the conversation, or it edits a message by
                the name of a token.
        """
        after, ids = self.chat_parts()[1], []
        pieces = list(chat.pieces(self._render, messages, self._token_names, self._where))
        last, is_control = pieces[-1]
        if not (is_control and last.endswith(after)):
            raise DataError(
                f"the chat template of tokenizer {self._where} ends {[r for r, _ in messages]} with {last[-80:]!r}; it "
                f"must end with {after!r}, as after one message. Set --data.no-chat."
            )
        pieces[-1] = last.removesuffix(after), is_control
        for text, is_control in pieces:
            ids += self.encode_rendered(text) if is_control else self.encode_continuation(text)
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Encode a template's text: names of added tokens are these tokens, the rest is text without added spaces."""
        ids: list[int] = []
        for part in self._token_pattern.split(text) if self._token_names else [text]:
            if part in self._token_names:
                ids.append(self._token_names[part])
            elif part:
                ids += self.encode_continuation(part)
        return ids

    @cached_property
    def _token_names(self) -> dict[str, int]:
        """Added tokens by their text, without the marks that thoughts are read by."""
        added = {token.content: int(i) for i, token in self._backend.added_tokens_decoder.items()}
        return {content: i for content, i in added.items() if content not in (THINK_OPEN, THINK_CLOSE, BOX_OPEN)}

    @cached_property
    def _token_pattern(self) -> re.Pattern:
        longest_first = sorted(self._token_names, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def _render(self, messages: list[tuple[str, str]], **options) -> str:
        text = chat.render(
            self._backend, messages, self._where, options=self.chat_options, date=self.chat_date, **options
        )
        # Drop the template's BOS: the trunk adds one.
        return text if self.bos_id is None else text.removeprefix(self._backend.convert_ids_to_tokens(self.bos_id))

    def check_bytes(self) -> None:
        """Encode a probe text and compare the tokens' bytes with the normalised text.

        Raises:
            DataError: they differ.
        """
        ids = self.encode(_PROBE)
        if self.unk_id is not None and self.unk_id in ids:
            return  # without byte fallback, documents that it cannot spell are refused one by one
        if (spelled := self.misspelled(_PROBE, ids)) is not None:
            raise DataError(
                f"tokenizer {self._where} encodes {_PROBE!r} to tokens with the bytes {spelled!r}; they must join to "
                "the text. Use a byte-level BPE, SentencePiece or tiktoken vocabulary."
            )

    def misspelled(self, text: str, ids: list[int], *, continues: bool = False) -> bytes | None:
        """Return the bytes of `ids` if they differ from the normalised `text`, else None.

        Args:
            text: that was encoded.
            ids: its tokens.
            continues: `encode_continuation` encoded it; else the space that the tokenizer adds is part of it.
        """
        expected = self._normalised(text)
        if continues and self.adds_space:
            expected = self._normalised("\n" + text).removeprefix(self._normalised("\n"))
        spelled = self._join(ids)
        return None if spelled == expected.encode() else spelled

    def _normalised(self, text: str) -> str:
        """Return what the tokens of a text must spell: the text after normalisation, with the spaces that it adds."""
        backend = self._backend.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        if '"Metaspace"' in json.dumps(self._description.get("pre_tokenizer")):
            text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
        # SentencePiece spells a space and U+2581 alike.
        return text.replace("\u2581", " ") if _speller(self._description) is _spell_sentencepiece else text

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into a directory: those that it was read from, unchanged, if there are any."""
        source, target = Path(self._where), Path(directory)
        files = [source / name for name in _FILES] if source.is_dir() else []
        files = [f for f in [*files, *source.glob("*.tiktoken")] if f.is_file()] if source.is_dir() else []
        if not files:
            self._backend.save_pretrained(str(target))
        elif source.resolve() != target.resolve():
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                shutil.copyfile(file, target / file.name)
            if not (source / "tokenizer.json").is_file():
                # Loaders that lack this vocabulary's format read the pipeline.
                self._backend.backend_tokenizer.save(str(target / "tokenizer.json"))
                if not (settings := target / "tokenizer_config.json").exists():
                    # Without a class, transformers 5 takes that of the model, with its own splitter.
                    values = {"tokenizer_class": "PreTrainedTokenizerFast", **self._backend.special_tokens_map}
                    settings.write_text(json.dumps(values, indent=2))

    @cached_property
    def _description(self) -> dict:
        return json.loads(self._backend.backend_tokenizer.to_str())

    @cached_property
    def encoding_fingerprint(self) -> str:
        """sha256 of all that maps text to ids (vocabulary, merges, normalisation, splitting) and of the ids' bytes."""
        parts = {name: self._description.get(name) for name in ("model", "normalizer", "pre_tokenizer")}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for token in self._bytes:
            digest.update(len(token).to_bytes(4, "big") + token)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the encoding and the special ids, on which tokens, rewards and prompts depend."""
        return hashlib.sha256(repr((self.bos_id, self.eos_id, self.encoding_fingerprint)).encode()).hexdigest()

    def unspeakable(self, text: str) -> str | None:
        """Return a piece of `text` that a unigram vocabulary would read as a control token or a byte, or None."""
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
    """Return how vocabulary entries spell bytes: byte-level, byte fallback with U+2581, or plain text."""
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

"""Tokenizers from directories, and new ones: trained on a corpus, or with a closed vocabulary."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers

from rpt_jax.errors import DataError
from rpt_jax.tokenizer.formats import is_tiktoken, read_sentencepiece, read_tiktoken
from rpt_jax.tokenizer.vocabulary import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer directory.

    Formats, in this order: tokenizer.json, tokenizer.model (SentencePiece or tiktoken), a .tiktoken file, vocab.json
    with merges.txt. Nothing in the directory is executed.

    Raises:
        DataError: the directory is missing, holds none of these, does not parse, or the exact bytes of its tokens are
            not known.
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
    except Exception as error:  # for damaged files the libraries raise anything from OSError to a bare Exception
        raise DataError(f"tokenizer {directory} does not load ({error}); replace the damaged file.") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if tokenizer is None:
        raise DataError(
            f"no tokenizer in {directory} (found {has[:8]}); it must contain tokenizer.json, tokenizer.model, a "
            ".tiktoken file, or vocab.json with merges.txt. Check data.tokenizer."
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
    """Return the special tokens and the chat template in tokenizer_config.json."""
    if not path.exists():
        return {}
    config = json.loads(path.read_text())
    names = ("bos_token", "eos_token", "unk_token", "chat_template")
    values = {name: config.get(name) for name in names}
    # A token is a string, or an object with a content field.
    values = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: v for name, v in values.items() if isinstance(v, str)}


_EOS_CANDIDATES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")


def _fast(backend: tokenizers.Tokenizer, special: dict[str, str] | None = None) -> transformers.PreTrainedTokenizerFast:
    """Wrap a bare tokenizer. Its end token is that of `special`, or the first conventional one that it has."""
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
    """Train a byte-level BPE with the response marks as tokens, for corpora without a tokenizer."""
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
    """Make a closed vocabulary whose entries are text: words with their leading space, digits, marks.

    Other text encodes to `<unk>`.
    """
    vocab = {entry: i for i, entry in enumerate(["<eos>", "<unk>", *entries])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = sorted(entries, key=len, reverse=True)
    pattern = tokenizers.Regex("|".join(re.escape(e) for e in longest_first))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<eos>", "<unk>"])
    return Tokenizer(_fast(backend), where="closed vocabulary")

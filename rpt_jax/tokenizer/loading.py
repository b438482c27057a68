"""Tokenizers from directories, and new ones: trained on a corpus, or with a closed vocabulary."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import transformers

from rpt_jax.errors import DataError
from rpt_jax.tokenizer.formats import is_tiktoken, read_sentencepiece, read_tiktoken
from rpt_jax.tokenizer.splitters import find_splitter
from rpt_jax.tokenizer.vocabulary import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer


def load_tokenizer(path: str | Path, pattern: str = "") -> Tokenizer:
    """Read a tokenizer directory.

    Formats, in this order: tokenizer.json, tokenizer.model (SentencePiece or tiktoken), a .tiktoken file, vocab.json
    with merges.txt. Nothing in the directory is executed.

    Args:
        path: of the directory.
        pattern: how text is split before merging, for files that do not tell (`splitters.py`).
    Raises:
        DataError: the directory is missing, contains none of these or does not parse; the tokenizer has no end token;
            the bytes of its tokens do not join to the text; the splitter is unknown, or `pattern` has no effect.
    """
    directory = Path(path)
    has = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = _read(directory, has, pattern)
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


def _read(directory: Path, has: list[str], pattern: str) -> Tokenizer | None:
    where, configured = str(directory), read_configured(directory)
    ranks = [directory / name for name in has if name.endswith(".tiktoken")]
    if "tokenizer.model" in has and is_tiktoken(directory / "tokenizer.model"):
        ranks = [directory / "tokenizer.model"]
    states_splitter = "tokenizer.json" in has or ("tokenizer.model" in has and not ranks)
    if pattern and states_splitter:
        raise DataError(
            f"data.tokenizer_pattern={pattern!r} has no effect: the files of tokenizer {where} state how text is "
            "split. Leave it out."
        )
    if "tokenizer.json" in has:
        # The pipeline of the file itself: classes named in config files may replace its normaliser or splitter.
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    elif states_splitter:
        backend, special = read_sentencepiece(directory / "tokenizer.model")
        configured = replace(configured, names=special | configured.names)
    elif ranks:
        backend = read_tiktoken(ranks[0], find_splitter([ranks[0].name, configured.kind], pattern, where))
    elif {"vocab.json", "merges.txt"} <= set(has):
        files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
        backend = tokenizers.Tokenizer.from_str(tokenizers.ByteLevelBPETokenizer.from_file(*files).to_str())
        # GPT-2 came in these files, so they are its own where no class is named.
        find_splitter([configured.kind or "gpt2"], pattern, where).apply(backend)
        _add_tokens(backend, configured.added)
    else:
        return None
    _check_named(backend, configured, where)
    options = configured.names | ({"chat_template": configured.chat_template} if configured.chat_template else {})
    return Tokenizer(_fast(backend, options), where=where, adds_bos=configured.adds_bos)


@dataclass(frozen=True, kw_only=True)
class Configured:
    """What the JSON files next to a vocabulary say."""

    names: dict[str, str]
    """bos_token, eos_token and unk_token, as far as they are named."""
    added: dict[int, tokenizers.AddedToken]
    """Added tokens by id."""
    chat_template: str | None
    adds_bos: bool | None
    """add_bos_token; None: the files do not say."""
    kind: str
    """tokenizer_class; "" where none is named."""


def read_configured(directory: Path) -> Configured:
    """Read tokenizer_config.json, added_tokens.json, special_tokens_map.json and the chat template files.

    Raises:
        DataError: a file or an entry that does not parse; names it.
    """
    config = _read_object(directory / "tokenizer_config.json")
    given = _read_object(directory / "special_tokens_map.json") | config
    names = {}
    for name in ("bos_token", "eos_token", "unk_token"):
        value = given.get(name)
        # A token is a string, or an object with a content field.
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    adds_bos = config.get("add_bos_token")
    return Configured(
        names=names,
        added=_added_tokens(directory, config),
        chat_template=_chat_template(directory, config),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        kind=str(config.get("tokenizer_class") or ""),
    )


def _added_tokens(directory: Path, config: dict) -> dict[int, tokenizers.AddedToken]:
    try:
        plain = {int(i): {"content": content} for content, i in _read_object(directory / "added_tokens.json").items()}
        entries = plain | {int(i): entry for i, entry in config.get("added_tokens_decoder", {}).items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        return {
            i: tokenizers.AddedToken(
                entry["content"],
                special=bool(entry.get("special", entry["content"] not in (THINK_OPEN, THINK_CLOSE, BOX_OPEN))),
                **{"normalized": False} | {name: entry[name] for name in flags if name in entry},
            )
            for i, entry in sorted(entries.items())
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{directory}: added tokens do not parse ({error!r}); each needs an id and a content. Correct "
            "added_tokens.json or added_tokens_decoder in tokenizer_config.json."
        ) from error


def _chat_template(directory: Path, config: dict) -> str | None:
    """Return the chat template: of chat_template.jinja or .json, else of the config; the default of a named list."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text()
    value = _read_object(directory / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(value, list):
        named = {t["name"]: t["template"] for t in value if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _read_object(path: Path) -> dict:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise DataError(f"{path} is a JSON {type(value).__name__}; it must be an object. Replace it.")
    return value


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[int, tokenizers.AddedToken]) -> None:
    """Add the named tokens that a bare vocabulary lacks, in the order of their ids; `_check_named` compares the ids."""
    for token in added.values():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _check_named(backend: tokenizers.Tokenizer, configured: Configured, where: str) -> None:
    """Raise DataError if a file names a token that the vocabulary lacks, or has at another id."""
    for token_id, token in configured.added.items():
        if backend.token_to_id(token.content) != token_id:
            raise DataError(
                f"tokenizer {where}: token {token.content!r} should have id {token_id}, and the vocabulary has it at "
                f"{backend.token_to_id(token.content)}. Use files that belong together."
            )
    for name, content in configured.names.items():
        if backend.token_to_id(content) is None:
            raise DataError(
                f"tokenizer {where}: {name} is {content!r}, which the vocabulary lacks; nothing is added to a "
                "vocabulary. Use files that belong together."
            )


_EOS_CANDIDATES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")


def _fast(backend: tokenizers.Tokenizer, special: dict[str, str] | None = None) -> transformers.PreTrainedTokenizerFast:
    """Wrap a bare tokenizer. Its end token is that of `special`, else a conventional one, control tokens first."""
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
    """Make a closed vocabulary whose entries are plain text: words with their leading space, digits, marks.

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

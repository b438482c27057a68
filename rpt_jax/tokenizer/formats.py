"""SentencePiece and tiktoken vocabularies, rebuilt as `tokenizers` pipelines.

The library's converters assume the settings of one model; these pipelines follow the file.
"""

import base64
import binascii
import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from rpt_jax.errors import DataError
from rpt_jax.tokenizer.splitters import Splitter

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def byte_level_alphabet() -> dict[str, int]:
    """Map GPT-2's printable characters to bytes. Source: openai/gpt-2 src/encoder.py bytes_to_unicode, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def is_tiktoken(path: Path) -> bool:
    """Return whether the file's first line is a base64 token and its rank."""
    with path.open("rb") as file:
        parts = file.readline(1000).split()
    try:
        return len(parts) == 2 and bool(base64.b64decode(parts[0], validate=True)) and int(parts[1]) >= 0
    except (binascii.Error, ValueError):
        return False


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Read a SentencePiece model; return (pipeline, {"bos_token", "eos_token", "unk_token"} as far as it has them).

    Raises:
        DataError: it is damaged, or needs what the pipeline does not support.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    SentencePieceProcessor(str(path))  # raises for damaged files
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise DataError(
            f"{path} is a SentencePiece model of type {trainer.model_type} or with unusual whitespace; it must be "
            "unigram or BPE with escaped, leading spaces. Use another tokenizer."
        )
    pieces = list(proto.pieces)
    if trainer.model_type == _UNIGRAM:
        vocab = [(p.piece, p.score) for p in pieces]
        model = models.Unigram(vocab, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        by_score = sorted((p for p in pieces if p.type not in (_CONTROL, _USER_DEFINED)), key=lambda p: -p.score)
        vocab = {p.piece: i for i, p in enumerate(pieces)}
        model = models.BPE(
            vocab,
            _merges([p.piece for p in by_score], vocab),
            unk_token=pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    backend = tokenizers.Tokenizer(model)
    has_symbols = any(p.type == _USER_DEFINED for p in pieces)
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix and not has_symbols:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    if spec.add_dummy_prefix and has_symbols:
        # A normaliser would add a space after every symbol.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == _CONTROL])
    backend.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == _USER_DEFINED])
    if 0 <= trainer.bos_id < len(pieces):
        bos = pieces[trainer.bos_id].piece
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, trainer.bos_id)]
        )
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return backend, {name: pieces[i].piece for name, i in ids.items() if 0 <= i < len(pieces)}


def read_tiktoken(path: Path, splitter: Splitter) -> tokenizers.Tokenizer:
    """Read a tiktoken file as byte-level BPE: each line is a base64 token and its rank, which is its id.

    Special tokens come from added_tokens_decoder in tokenizer_config.json, else from the splitter's family.

    Raises:
        DataError: a line does not parse, ids have gaps, or special tokens are unknown or have other ids.
    """
    letters = {byte: character for character, byte in byte_level_alphabet().items()}
    vocab: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            entry = "".join(letters[b] for b in base64.b64decode(token, validate=True))
            vocab[entry] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"{path} line {number}: {line[:40]!r} is not a base64 token and its rank ({error}); "
                "replace the damaged file."
            ) from error
    special = _special_tokens(path.parent / "tokenizer_config.json")
    first = len(vocab)
    if sorted(vocab.values()) != list(range(first)):
        raise DataError(f"{path} has {first} tokens whose ranks are not 0 to {first - 1}; replace the damaged file.")
    if not special and first == splitter.num_tokens:
        special = {i: AddedToken(t, special=True, normalized=False) for i, t in splitter.special.items()}
    if not special:
        raise DataError(
            f"{path} has {first} tokens, and no file tells the special tokens that follow them. Name them in "
            'tokenizer_config.json beside it: "added_tokens_decoder": {"' + str(first) + '": {"content": '
            '"<|endoftext|>"}}.'
        )
    for number in range(first, max(special) + 1):
        special.setdefault(number, AddedToken(f"<|unused_{number}|>", special=True, normalized=False))
    in_order = sorted(vocab, key=vocab.__getitem__)
    backend = tokenizers.Tokenizer(models.BPE(vocab, _merges(in_order, vocab), ignore_merges=True))
    splitter.apply(backend)
    backend.decoder = decoders.ByteLevel()
    for number in sorted(special):
        token = special[number]
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise DataError(
                f"{path.parent / 'tokenizer_config.json'}: token {token.content!r} should have id {number}, which the "
                f"{first} tokens of {path.name} do not allow. Use files that belong together."
            )
    return backend


def _special_tokens(config: Path) -> dict[int, AddedToken]:
    if not config.exists():
        return {}
    try:
        entries = json.loads(config.read_text()).get("added_tokens_decoder", {})
        return {
            int(number): AddedToken(e["content"], special=bool(e.get("special", True)), normalized=False)
            for number, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{config}: added_tokens_decoder does not parse ({error!r}); correct the file.") from error


def _merges(in_order: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Derive the BPE merges from the vocabulary: every pair of entries that forms an entry, best entries first."""
    merges = []
    for entry in in_order:
        pairs = [(entry[:i], entry[i:]) for i in range(1, len(entry)) if entry[:i] in vocab and entry[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges

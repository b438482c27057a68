"""How text is split before byte-level merges, for vocabulary files that do not state it.

A tiktoken file, and vocab.json with merges.txt, hold tokens and their ranks only. The splitting pattern and the special
tokens belong to the model family, which the file's name or tokenizer_config.json may tell.
"""

from dataclasses import dataclass, field

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

from rpt_jax.errors import DataError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """The splitter and the special tokens of a model family."""

    pattern: str
    """Regular expression; its matches, and what lies between them, are merged on their own."""
    num_tokens: int = 0
    """Tokens of the family's vocabulary file, which has no special ones."""
    special: dict[int, str] = field(default_factory=dict)
    """Special tokens by id, for that file alone, without added_tokens_decoder."""
    is_nfc: bool = False
    """Text is normalised to NFC first."""

    def apply(self, backend: tokenizers.Tokenizer) -> None:
        if self.is_nfc:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


# Sources: openai/tiktoken tiktoken_ext/openai_public.py; transformers Qwen2Tokenizer; meta-llama/llama3 tokenizer.py.
SPLITTERS = {
    "gpt2": Splitter(
        pattern=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        num_tokens=50_256,
        special={50256: "<|endoftext|>"},
    ),
    "qwen": Splitter(
        pattern=_LETTERS + r"\p{N}" + _REST,
        num_tokens=151_643,
        special={151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
        is_nfc=True,
    ),
    "cl100k": Splitter(
        # \z: unlike Llama 3's, white space at the end of a text stays whole.
        pattern=_LETTERS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
        num_tokens=100_256,
        special={
            100257: "<|endoftext|>",
            100258: "<|fim_prefix|>",
            100259: "<|fim_middle|>",
            100260: "<|fim_suffix|>",
            100276: "<|endofprompt|>",
        },
    ),
    "o200k": Splitter(
        pattern=(
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        num_tokens=199_998,
        special={199999: "<|endoftext|>", 200018: "<|endofprompt|>"},
    ),
    "llama3": Splitter(
        pattern=_LETTERS + r"\p{N}{1,3}" + _REST,
        num_tokens=128_000,
        special={
            128000: "<|begin_of_text|>",
            128001: "<|end_of_text|>",
            128006: "<|start_header_id|>",
            128007: "<|end_header_id|>",
            128009: "<|eot_id|>",
        },
    ),
}
_ALSO = {"r50k": "gpt2", "roberta": "gpt2", "llama-3": "llama3"}


def find_splitter(names: list[str], pattern: str, where: str) -> Splitter:
    """Return the splitter of `pattern`, else of the first name that contains a family's.

    Args:
        names: of the vocabulary file and of the tokenizer's class.
        pattern: a key of SPLITTERS, a regular expression, or "".
        where: of the vocabulary, for messages.
    Raises:
        DataError: no name tells the family and `pattern` is empty, or `pattern` is no regular expression.
    """
    if pattern in SPLITTERS:
        return SPLITTERS[pattern]
    if pattern:
        try:
            Regex(pattern)
        except Exception as error:  # the library raises a bare Exception
            raise DataError(
                f"data.tokenizer_pattern={pattern!r} is neither one of {', '.join(SPLITTERS)} nor a regular expression "
                f"({error}). Correct it."
            ) from error
        return Splitter(pattern=pattern)
    families = dict(zip(SPLITTERS, SPLITTERS, strict=True)) | _ALSO
    for name in names:
        for key, family in families.items():
            if key in name.lower():
                return SPLITTERS[family]
    raise DataError(
        f"tokenizer {where}: its files do not tell how text is split before merging, and tokens depend on it (names: "
        f"{', '.join(filter(None, names))}). Set --data.tokenizer-pattern to one of {', '.join(SPLITTERS)} or to a "
        "regular expression."
    )

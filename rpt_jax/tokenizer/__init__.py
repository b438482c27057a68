"""Text to ids and back: the vocabulary and its exact bytes, tokenizer files, chat templates."""

from rpt_jax.tokenizer.loading import load_tokenizer, train_byte_level, word_level
from rpt_jax.tokenizer.vocabulary import BOX_OPEN, THINK_CLOSE, THINK_OPEN, Tokenizer

__all__ = ["BOX_OPEN", "THINK_CLOSE", "THINK_OPEN", "Tokenizer", "load_tokenizer", "train_byte_level", "word_level"]

"""TRL's worker for `experiments.benchmarks.peers`: a GRPOTrainer whose training loop waits for its turn between steps.

Rollouts use transformers' `generate` on the whole batch. An update runs 8 rows per pass, which is fastest. Gradient
checkpointing is off. With one update per batch, TRL runs no pass for old log-probabilities.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.benchmarks.peers import (
    GROUP_SIZE,
    LEARNING_RATE,
    NUM_CORES,
    STOP_ID,
    VOCABULARY,
    Shape,
    Turns,
    as_worker,
    reward,
)

# Rollouts per forward-backward pass.
MICROBATCH_ROWS = 8


class WaitForTurn(TrainerCallback):
    """Releases the training loop when the driver requests a step."""

    def __init__(self, turns: Turns):
        self._turns = turns

    def on_train_begin(self, args, state, control, **kwargs):
        """Wait for the first turn."""
        self._turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        """Report the step, then wait for the next turn or stop training."""
        self._turns.answer()
        control.should_training_stop = not self._turns.wait()


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that reports when the completions and rewards of a batch are ready."""

    turns: Turns

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.turns.rolled_out(int(batch["completion_mask"].sum()))
        return batch


def rewards(completion_ids, **columns) -> list[float]:
    """Return `peers.reward` of every completion."""
    return [reward(ids) for ids in completion_ids]


def make_model() -> Qwen3ForCausalLM:
    """Return a randomly initialised model of the shape of `common.MODEL_S`."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=STOP_ID,
            pad_token_id=STOP_ID,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose text is decimal ids separated by spaces."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token=str(STOP_ID)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    stop = str(STOP_ID)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stop, pad_token=stop, padding_side="left")


def make_arguments(shape: Shape, rows: int, directory: str) -> GRPOConfig:
    """Return TRL's settings, with `rows` rollouts per pass of the update."""
    return GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        beta=0.0,
        num_iterations=1,
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=shape.num_prompts * GROUP_SIZE // rows,
        max_completion_length=shape.new_tokens,
        generation_kwargs={"min_new_tokens": shape.new_tokens},
        temperature=1.0,
        max_steps=1_000_000,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train until the driver is done."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one-pass", action="store_true", help="run all rows of an update in one pass")
    shape, turns, args = as_worker(parser)
    rows = shape.num_prompts * GROUP_SIZE if args.one_pass else MICROBATCH_ROWS
    torch.set_num_threads(NUM_CORES)
    prompts = [" ".join(map(str, ids)) for ids in shape.prompts()]
    with tempfile.TemporaryDirectory() as directory:
        trainer = TimedTrainer(
            model=make_model(),
            reward_funcs=rewards,
            args=make_arguments(shape, rows, directory),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=make_tokenizer(),
            callbacks=[WaitForTurn(turns)],
        )
        trainer.turns = turns
        trainer.train()


if __name__ == "__main__":
    main()

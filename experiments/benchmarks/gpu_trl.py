"""TRL's worker for `experiments.benchmarks.gpu`: GRPO steps on the same batch, with prompts repeated for each rollout.

It reads a JSON object from standard input and prints one, {"steps": [seconds of each step], "rollouts": [...]}. The
rollouts use transformers' `generate` on the whole batch. The update runs `rows` rows per pass in bfloat16, with
gradient checkpointing. It imports nothing of this package.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that notes how long its rollouts take."""

    rollout_seconds: list

    def _generate_and_score_completions(self, inputs):
        begin = time.perf_counter()
        batch = super()._generate_and_score_completions(inputs)
        _wait()
        self.rollout_seconds.append(time.perf_counter() - begin)
        return batch


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Note the start."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        """Note the end of a step."""
        _wait()
        self.ends.append(time.perf_counter())


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rewards(completion_ids, **columns) -> list[float]:
    """Return an arbitrary reward that varies within groups: the mean of the completion's ids, scaled down."""
    return [sum(ids) / len(ids) / 1e6 for ids in completion_ids]


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose text is decimal ids separated by spaces; the last id is the stop token."""
    stop = str(vocab_size - 1)
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(vocab_size)}, unk_token=stop))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=stop, pad_token=stop, padding_side="left")


def make_arguments(spec: dict, directory: str) -> GRPOConfig:
    """Return TRL's settings for the batch."""
    on_gpu, rows = torch.cuda.is_available(), len(spec["prompts"]) * spec["group_size"]
    return GRPOConfig(
        output_dir=directory,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=on_gpu,
        beta=0.0,
        num_iterations=1,
        num_generations=spec["group_size"],
        per_device_train_batch_size=spec["rows"],
        gradient_accumulation_steps=rows // spec["rows"],
        max_completion_length=spec["new"],
        generation_kwargs={"min_new_tokens": spec["new"]},
        temperature=1.0,
        max_steps=spec["steps"],
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train the steps that the specification names, and print their seconds."""
    spec = json.load(sys.stdin)
    stop = spec["model"]["vocab_size"] - 1
    config = AutoConfig.for_model(**spec["model"] | {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": stop})
    prompts = [" ".join(map(str, ids)) for ids in spec["prompts"]]
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_config(config),
            reward_funcs=rewards,
            args=make_arguments(spec, directory),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=make_tokenizer(stop + 1),
            callbacks=[clock],
        )
        trainer.rollout_seconds = []
        trainer.train()
    steps = [end - begin for begin, end in zip(clock.ends, clock.ends[1:])]
    print(json.dumps({"steps": steps, "rollouts": trainer.rollout_seconds}))


if __name__ == "__main__":
    main()

"""The model card of an export: what the policy is, how it was trained, what was measured, how to use it."""

import json
import shlex
from pathlib import Path

from rpt_jax.analysis.reports.headline import headline, question_headline
from rpt_jax.analysis.reports.run import headline_split
from rpt_jax.config import Config
from rpt_jax.train.run_directory import read_json


def model_card(directory: Path, config: Config, step: int, name: str) -> str:
    """Return the card as Markdown.

    Args:
        directory: of the run; its results.json may be missing.
        config: of the run.
        step: of RL that the exported policy comes from.
        name: of the exported directory.
    """
    corpus = read_json(directory / "corpus.json")
    start = f"`{config.policy.path}`" if config.policy.path else "random parameters"
    warm = f", {config.supervised.num_steps} supervised updates (warm start)" if config.supervised.num_steps else ""
    data = config.questions.path or config.data.path or ", ".join(config.data.mixture)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in corpus["training"].items() if isinstance(count, int))
    lora = f"LoRA rank {config.lora.rank}, merged" if config.lora.rank else "all parameters"
    m = config.model
    return f"""---
library_name: transformers
tags: [reinforcement-pre-training, rpt_jax]
---

# {name}

{m.family}, {m.num_layers} layers of width {m.width}, vocabulary {m.vocab_size:,}. Trained with rpt_jax: reinforcement
pre-training ([arXiv:2506.08007](https://arxiv.org/abs/2506.08007)).

## Training

- Start: {start}{warm}.
- {step} RL steps of {config.rollout.num_trunks} trunks x {config.rollout.prompts_per_trunk} prompts x
  {config.rollout.group_size} rollouts of up to {config.rollout.max_completion_tokens} tokens, temperature
  {config.rollout.temperature:g}; reward {" + ".join(config.reward.terms)}; learning rate
  {config.optimizer.learning_rate:g}; {lora}; seed {config.run.seed}.
- Data: `{data}` ({kinds}).

## Figures

{_figures(directory)}

## Use

{_format(config)} {_prompts(config)} Stop ids are in `generation_config.json`.

    python -m experiments.sample --policy {name} --prompt "..."{_flags(config)}
    vllm serve {name}

The export was loaded with transformers 5.23; vLLM has not been tried.

It is a research artifact. Nothing was done for safety, factuality or following instructions, and the figures above say
nothing about tasks that were not measured. The licences of the start model and of the data apply.
"""


def _format(config: Config) -> str:
    thought = "a thought, `</think>`, and " if config.reward.require_think_end else ""
    return f"Training rewarded what the policy writes: {thought}its answer in `\\boxed{{}}`."


def _prompts(config: Config) -> str:
    template = config.questions.template if config.questions.path else config.data.template
    chat = " inside the chat template" if config.data.chat else ""
    # A text, unlike a name, may have several lines.
    return f"Prompts are those of the template `{template if template.isidentifier() else repr(template)}`{chat}."


def _flags(config: Config) -> str:
    limit = f" --max-tokens {config.rollout.max_completion_tokens}"
    if config.questions.path:
        return (" --chat" if config.data.chat else "") + limit
    chat = " --chat-template" if config.data.chat else ""
    return f" --think --template {shlex.quote(config.data.template)}{chat}{limit}"


def _figures(directory: Path) -> str:
    path = directory / "results.json"
    if not path.exists():
        return "The run has no report yet, so nothing was measured."
    results = json.loads(path.read_text())
    is_documents = "sampled_prefix" in results["after"]["all"]
    sentences = headline(results, headline_split(results)) if is_documents else question_headline(results)
    return "\n".join(f"- {sentence}" for sentence in sentences) + "\n\n± is one standard error."

"""Sample from a run or a model directory, and print what comes with probabilities.

python -m experiments.sample --policy runs/quickstart --prompt "The dial on the safe shows 6." --think
python -m experiments.sample --policy runs/smollm2 --prompt "What is 2 + 3?" --chat [-n 4] [--temperature 0.7]

--think: thoughts about the next token, their predictions, and the probabilities that they make, next to those without
thinking; a run on questions is asked the prompt as in training. --chat: the prompt is a user's message, and nothing is
added. Otherwise, the prompt is continued.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import rpt_jax
from experiments.cli import run_script


def main(argv: list[str]) -> None:
    """Load the policy, sample, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="run directory or Hugging Face model directory")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("-n", type=int, default=4, help="number of samples")
    parser.add_argument("--max-tokens", type=int, default=0, help="0: 256, or with --think as in training")
    parser.add_argument("--temperature", type=float, help="default: 1, or with --think as in training")
    parser.add_argument("--template", default="", help="of --think, as --data.template; default: the run's, or minimal")
    parser.add_argument("--chat-template", action="store_true", help="put the prompt of --think into it")
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--think", action="store_true")
    kind.add_argument("--chat", action="store_true")
    args = parser.parse_args(argv)
    policy = rpt_jax.load(args.policy, template=args.template, chat=True if args.chat_template else None)
    temperature = 1.0 if args.temperature is None else args.temperature
    if not args.think:
        prompt = [{"role": "user", "content": args.prompt}] if args.chat else args.prompt
        # One at a time, so that each is printed as soon as it is there.
        for number in range(args.n):
            (sample,) = policy.sample(
                prompt, max_tokens=args.max_tokens or 256, temperature=temperature, seed=args.seed + number
            )
            print(f"sample {number + 1}: {sample.text!r}{'' if sample.is_finished else ' …'}", flush=True)
        return
    thinking = policy.think(
        args.prompt, args.n, max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    for number, thought in enumerate(thinking.thoughts, start=1):
        print(f"thought {number}: {thought.text!r} -> {thought.prediction!r}")
    if policy.config.questions.path:
        print(f"answer after thinking: {_listed(thinking.probabilities)}")
        return
    print(f"next token after thinking: {_listed(thinking.probabilities)}")
    print(f"next token directly:       {_listed(policy.next_token(args.prompt))}")


def _listed(tokens: Iterable) -> str:
    return "  ".join(f"{token.text!r} {token.probability:.3f}" for token in list(tokens)[:6])


if __name__ == "__main__":
    run_script(main)

"""Export a run's newest policy as a Hugging Face model directory, with its tokenizer and a model card.

python -m experiments.convert_hf --run runs/tiny_text --out exported [--dtype bfloat16]
python -m experiments.convert_hf --run runs/tiny_text --out adapters --adapters      # PEFT layout; LoRA runs only

On another machine, add the settings that differ there: --mesh.fsdp 1 --mesh.tensor 1 --model.activation-dtype float32.
"""

import argparse
from pathlib import Path

from experiments.cli import load_run, run_script
from rpt_jax.analysis.model_card import model_card
from rpt_jax.errors import ConfigError
from rpt_jax.models.hf import save_hf
from rpt_jax.models.lora import merge, save_adapters
from rpt_jax.parallel.mesh import make_mesh
from rpt_jax.parallel.programs import use_cache
from rpt_jax.tokenizer import load_tokenizer
from rpt_jax.tokenizer.stops import read_generation_config
from rpt_jax.train.policies import is_reward_model, newest_of_run


def main(argv: list[str]) -> None:
    """Export the newest policy, or only its adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run directory with an RL checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored; float32 for merged weights"
    )
    parser.add_argument("--adapters", action="store_true", help="export only the RL stage's adapters, unmerged")
    args, flags = parser.parse_known_args(argv)
    config = load_run(args.run, flags)
    if is_reward_model(config):
        raise ConfigError(
            f"--run {args.run} trained a reward model; experiments.reward_model --run {args.run} --export writes it."
        )
    use_cache(config.run.compilation_cache)
    mesh, tokenizer = make_mesh(config.mesh), load_tokenizer(args.run / "tokenizer")
    if args.adapters and not config.lora.rank:
        raise ConfigError(
            f"--adapters with --run {args.run}, which trained all parameters; it needs a LoRA run. Remove --adapters."
        )
    if args.adapters and config.supervised.num_steps:
        raise ConfigError(
            f"--adapters with --run {args.run}, whose adapters sit on a warm-started policy; their base must be the "
            "weights of a checkpoint directory. Remove --adapters to export the merged policy."
        )
    state, frozen, step = newest_of_run(args.run, mesh)
    if args.adapters:
        save_adapters(args.out, config.lora, state.params, base=config.policy.path)
    else:
        policy = merge(frozen, state.params)
        source = read_generation_config(Path(config.policy.path)) if config.policy.path else {}
        stop_ids = config.rollout.stop_ids or (tokenizer.eos_id,)
        bos_id = source.get("bos_token_id") if tokenizer.bos_id is None else tokenizer.bos_id
        generation = source | {"bos_token_id": bos_id, "eos_token_id": list(stop_ids)}
        save_hf(args.out, config.model, policy, dtype=args.dtype, tokenizer=tokenizer, generation=generation)
        (args.out / "README.md").write_text(model_card(args.run, config, step, args.out.name))
    print(f"step {step} of {args.run} -> {args.out}")


if __name__ == "__main__":
    run_script(main)

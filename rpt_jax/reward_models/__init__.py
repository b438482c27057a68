"""Reward and value models: a scalar readout of a decoder, its losses, and labels that a policy makes itself.

    bradley_terry   which of several completions of a prompt is better
    outcome         whether a completion is right
    process         whether each step is right
    value           the value of each step
    labels          labels of outcomes and steps by Monte Carlo

`train/stages/reward_model.py` trains them, with branches of shared prompts; `rewards/models.py` uses them as rewards.
"""

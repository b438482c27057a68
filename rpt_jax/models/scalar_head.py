"""A scalar readout of a decoder's hidden states: critics, reward models and value models.

The readout is a leaf of the parameters, f32 [D] or [D + 1] with a bias last: Hugging Face's sequence classification has
none, its token classification has one. It is no weight of the language model: `lora.merge` leaves it out.
"""

import jax.numpy as jnp

READOUT = "value"


def init_readout(width: int, *, has_bias: bool):
    """Return a readout of zeros, so that every score starts at 0."""
    return jnp.zeros(width + has_bias, jnp.float32)


def read_scalars(params, hidden_D):
    """Return the readout f32 [...] of hidden states [..., D] after the final norm."""
    readout, D = params[READOUT], hidden_D.shape[-1]
    scalars = jnp.einsum("...d,d->...", hidden_D, readout[:D], preferred_element_type=jnp.float32)
    return scalars + readout[D] if len(readout) > D else scalars

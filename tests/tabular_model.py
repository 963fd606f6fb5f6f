"""A language model that can be counted: three words and EOS, at most two tokens, a free table over contexts."""

import jax
import jax.numpy as jnp

from dpo_jax.types import Model

WORDS, NEW = 4, 2
CONTEXTS = (WORDS + 1) ** NEW  # of at most NEW tokens


def tabular_model():
    """The hidden state is one-hot in the tokens seen, so that head and value function are free tables over contexts."""

    def states(codes, k_start, k_end):
        keys = jnp.arange(codes.shape[1], dtype=jnp.int32)[None, None, :]
        seen = (keys >= k_start[:, :, None]) & (keys < k_end[:, :, None])
        return jax.nn.one_hot(jnp.where(seen, codes[:, None, :], 0).sum(axis=-1), CONTEXTS)

    def codes_of(rows):
        return (jnp.asarray(rows.tokens) + 1) * (WORDS + 1) ** jnp.asarray(rows.positions)

    def decode(variables, rows, cache):
        codes = jax.lax.dynamic_update_slice(cache["codes"], codes_of(rows), (0, cache["length"]))
        hidden = states(codes, rows.k_start, rows.k_end)
        return hidden, {"codes": codes, "length": cache["length"] + jnp.int32(rows.tokens.shape[1])}

    return Model(
        init=lambda key: {"params": {"table": jax.random.normal(key, (CONTEXTS, WORDS))}},
        forward=lambda variables, rows: states(codes_of(rows), rows.k_start, rows.k_end),
        unembed=lambda variables, hidden: hidden @ variables["params"]["table"],
        init_cache=lambda batch, length, dtype: {"codes": jnp.zeros((batch, length), jnp.int32), "length": jnp.int32(0)},
        decode=decode,
        axes=lambda: {"params": {"table": jax.sharding.PartitionSpec(None, "vocab")}},
    )

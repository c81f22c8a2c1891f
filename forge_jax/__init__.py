"""forge_jax: pure-functional JAX tools for self-adaptive language models."""

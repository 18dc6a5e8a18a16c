"""`python -m sae_jax` is `sae-jax`."""

from sae_jax.cli import main

if __name__ == "__main__":
    main()

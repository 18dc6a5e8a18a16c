"""A shuffle without a table: where row i of epoch e lies is a function of (seed, e, i)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

ROUNDS = 6


def mix(value: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Scatter 32 bits over 32 bits, one to one (the finalizer of MurmurHash3)."""
    value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> 16)


def permute(
    index: UInt32[Array, "*n"], size: int, key: UInt32[Array, "*n"] | UInt32[Array, ""]
) -> UInt32[Array, "*n"]:
    """Where `index` goes in the permutation of `range(size)` that `key` names.

    A Feistel network on pairs (l, r) with l < a, r < b, a*b >= size, index = l*b + r:

        l <- l + hash(r, key) mod a;   r <- r + hash(l, key) mod b

    Each half-round can be undone, so the whole is a bijection of range(a*b). An index that lands at or
    beyond `size` is sent through again until it does not, which keeps it one on range(size); with
    a = ceil(sqrt(size)) that befalls at most one in sqrt(size).

    Args:
      index: positions in [0, size).
      size: how many there are, static, below 2^30.
      key: which permutation; one for all, or one per index.

    Returns:
      The rows at those positions, in [0, size).

    At sizes under ten or so the permutations are not equally likely.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    a = math.isqrt(size - 1) + 1 if size > 1 else 1
    b = -(-size // a)

    def shuffle(value):
        left, right = value // b, value % b
        for round in range(ROUNDS):
            salt = mix(key + jnp.uint32(0x9E3779B9) * jnp.uint32(round + 1))
            if round % 2 == 0:
                left = (left + mix(right ^ salt) % a) % a
            else:
                right = (right + mix(left ^ salt) % b) % b
        return left * b + right

    def outside(value):
        return (value >= size).any()

    def again(value):
        return jnp.where(value >= size, shuffle(value), value)

    return jax.lax.while_loop(outside, again, shuffle(index))


def divmod_product(
    i: UInt32[Array, ""], factor: int, size: int
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    """`divmod(i * factor, size)` where the product does not fit 32 bits.

    Long division, as many bits of `i` at a time as leave room below 2^32.

    Args:
      i: below 2^31.
      factor: at most `size`.
      size: below 2^30.

    Returns:
      Quotient (modulo 2^32) and remainder.
    """
    bits = max(1, 31 - size.bit_length())
    quotient = remainder = jnp.uint32(0)
    for shift in reversed(range(0, 31, bits)):
        digit = (i >> shift) & jnp.uint32(2**bits - 1)
        partial = (remainder << bits) + digit * jnp.uint32(factor)
        quotient = (quotient << bits) + partial // jnp.uint32(size)
        remainder = partial % jnp.uint32(size)
    return quotient, remainder

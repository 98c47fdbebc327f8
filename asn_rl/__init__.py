"""asn_rl: teach a frozen language model how to sample.

Decoding is a Gymnasium environment; a small permutation-equivariant policy acts on a sketch of the next-token
distribution. Start with `asn-rl --help`, or read DESIGN-level docs in `asn_rl.ops.sketch`.
"""

__version__ = "0.1.0"

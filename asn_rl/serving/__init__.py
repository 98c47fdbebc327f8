"""A trained policy inside the engines that serve models.

`PolicyDecoder` is what all of them share: next-token logits of a changing batch in, the policy's logits out, so that
the engine's own softmax and draw give the policy's distribution. `asn_rl.serving.transformers` puts it into `generate`
and continuous batching.
"""

from asn_rl.serving.decoder import PolicyDecoder, Row

__all__ = ["PolicyDecoder", "Row"]

"""Honest evaluation: comparison with static rules on held-out prompts, with intervals."""

"""Gymnasium environments in which decoding is a Markov decision process and an action is a sketch point, or the
heuristic that draws.

Importing the package registers the ids; models and torch are imported only when an environment is made:

    gym.make("asn_envs:asn/Decoding-v0", prompts="train.jsonl", reward="my_rewards:accuracy")
    gym.make_vec("asn_envs:asn/Decoding-v0", num_envs=64, prompts="train.jsonl", reward="my_rewards:accuracy")
"""

from gymnasium.envs.registration import register

register(
    id="asn/Decoding-v0",
    entry_point="asn_envs.decoding:DecodingEnv",
    vector_entry_point="asn_envs.vector:DecodingVectorEnv",
)
register(
    id="asn/ToyDecoding-v0",
    entry_point="asn_envs.toy:ToyDecodingEnv",
    vector_entry_point="asn_envs.toy:ToyDecodingVectorEnv",
)
register(
    id="asn/StrategyDecoding-v0",
    entry_point="asn_envs.strategy:StrategyDecodingEnv",
    vector_entry_point="asn_envs.strategy:StrategyDecodingVectorEnv",
)
register(id="asn/StrategyBandit-v0", entry_point="asn_envs.strategy_bandit:StrategyBanditEnv")

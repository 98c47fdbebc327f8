"""Reward functions in TRL's signature, and their composition. They are the labellers of the labelling pipeline, too.

A reward function is `f(prompts, completions, completion_ids=None, **columns) -> list[float | None]`, known by a short
name of `REWARDS` or as "module:function". It is imported when it is used: worker processes that score completions load
neither torch nor transformers.
"""

from __future__ import annotations

from asn_rl.registry import Registry

REWARDS = Registry(
    "reward function",
    {
        "numeric_answer": "asn_rl.rewards.numeric:numeric_answer",
        "exact_answer": "asn_rl.rewards.numeric:exact_answer",
        "extracted_answer": "asn_rl.rewards.extraction:extracted_answer",
        "math_answer": "asn_rl.rewards.math:math_answer",
        "code_tests": "asn_rl.rewards.code:code_tests",
        "choice_answer": "asn_rl.rewards.structured:choice_answer",
        "json_schema": "asn_rl.rewards.structured:json_schema",
        "ifeval": "asn_rl.rewards.ifeval:ifeval",
        "length_budget": "asn_rl.rewards.length:length_budget",
        "format_match": "asn_rl.rewards.format:format_match",
        "distinct_valid": "asn_rl.rewards.diversity:distinct_valid",
        "distinct_ngrams": "asn_rl.rewards.lexical_diversity:distinct_ngrams",
        "self_bleu_diversity": "asn_rl.rewards.lexical_diversity:self_bleu_diversity",
        "vendi_diversity": "asn_rl.rewards.embedding_diversity:vendi_diversity",
        "log_likelihood": "asn_rl.rewards.coherence:log_likelihood",
        "repetition_rate": "asn_rl.rewards.coherence:repetition_rate",
        "corpus_breaks": "asn_rl.rewards.corpus:corpus_breaks",
        "corpus_coverage": "asn_rl.rewards.corpus:corpus_coverage",
        "infini_gram_api_coverage": "asn_rl.rewards.corpus:infini_gram_api_coverage",
        "reward_model": "asn_rl.rewards.reward_model:reward_model",
        "served_reward_model": "asn_rl.rewards.reward_model:served_reward_model",
        "bradley_terry_head": "asn_rl.rewards.frozen_features:bradley_terry_head",
        "pairwise_judge": "asn_rl.rewards.judge:pairwise_judge",
        "judge_win": "asn_rl.rewards.judge_win:judge_win",
    },
)

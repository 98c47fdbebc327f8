"""Candidates of many heuristics, labelled, rated and selected: resumable stages over JSONL files."""

"""Answers to scores: metrics, evaluation sets, answers over seeds, likelihood."""

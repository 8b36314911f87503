"""Prompts and answers, for language models that learn to follow instructions."""

"""Helpers that know nothing of adapters."""

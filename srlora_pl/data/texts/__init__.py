"""Texts: GLUE and the user's own files."""

"""Texts: GLUE and files of one's own."""

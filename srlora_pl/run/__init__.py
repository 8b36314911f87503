"""One run of the command line. Nothing is imported here, so that a mistyped file name is answered at once."""

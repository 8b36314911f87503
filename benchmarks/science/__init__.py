"""Where SRLoRA wins: masked tokens, a task in which the rank of the pairs is what binds, and what is measured on it."""

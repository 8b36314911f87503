import torch

# The tests' networks are tiny and run in several processes at once: threads would only get in each other's way.
torch.set_num_threads(1)

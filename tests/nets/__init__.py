"""Nets under the core: trajectories and checkpoints that every later version must reproduce."""

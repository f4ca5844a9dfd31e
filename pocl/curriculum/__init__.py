"""PAPER  Which examples when, at which temperature, KD ratio and learning rate (numpy alone)."""

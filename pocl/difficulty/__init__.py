"""PAPER  How hard an example is: one file a signal, and the ranking that fuses them."""

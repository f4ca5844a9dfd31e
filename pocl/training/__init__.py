"""PAPER  Stages to a student: the loop, one optimiser step, the engine, what a run keeps."""

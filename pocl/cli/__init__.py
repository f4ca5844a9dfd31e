"""From the command line to the parts of a run, and nothing else."""

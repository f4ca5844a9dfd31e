"""POCL: curriculum distillation of language models (arXiv 2506.05695).

One folder a room, and imports run down only (tests/test_house.py holds it):

    cli          from the command line to the parts of a run
    training     stages to a student
    difficulty   how hard an example is
    evaluation   answers to scores
    generation   prompts to answers
    models       student and teacher
    curriculum   which examples when, at which temperature, KD ratio and learning rate
    losses       the objective
    data         records to batches
    common       what every room stands on
"""

__version__ = "0.1.0"

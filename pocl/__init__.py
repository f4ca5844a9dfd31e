"""POCL: curriculum distillation of language models (arXiv 2506.05695).

The files of this package stand in four layers, and imports run down only:

    4  trainer  difficulty  evaluation
    3  texts  checkpoints  objective  teacher  engine  vllm_backend  generation  models  data
    2  rundir  parts  tables  console  vllm_worker  vllm_choice
    1  losses  curriculum  on_policy  ranking  sampling  metrics  config  flags  distributed  files  errors
"""

__version__ = "0.1.0"

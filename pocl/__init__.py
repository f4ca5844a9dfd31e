"""POCL: curriculum distillation of language models (arXiv 2506.05695).

The files of this package stand in four layers, and imports run down only:

    4  trainer  difficulty  scoring  buckets  evaluation
    3  texts  checkpoints  objective  teacher  engine  vllm_backend  generation  models  lora  data
    2  journal  diagnostics  intervals  metrics  rundir  parts  tables  console  sampling  vllm_worker  vllm_choice
    1  losses  curriculum  pools  ranking  snapshot  on_policy  config  lora_options  flags  distributed  files  errors
"""

__version__ = "0.1.0"

"""POCL: curriculum distillation of language models (arXiv 2506.05695).

The files of this package stand in four layers, and imports run down only:

   4  assembly  plan_report  planning  planner  trainer  difficulty  scoring  buckets  evaluation  vllm_backend  config
   3  texts  checkpoints  objective  recipe  teacher  engine  generation  models  lora  data  vllm_worker  vllm_choice
   2  kv_cache  tied  offload  journal  snapshot  diagnostics  intervals  metrics  interrupt  rundir  parts  tables  console  sampling
   1  losses  curriculum  pools  ranking  on_policy  options  flags  distributed  products  files  statefile  errors
"""

__version__ = "0.1.0"

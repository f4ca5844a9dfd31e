"""POCL: curriculum distillation of language models (arXiv 2506.05695).

The files of this package stand in five layers, and imports run down only:

   5  assembly  plan_report  planning  planner  trainer  config
   4  difficulty  scoring  buckets  evaluation  vllm_backend  micro_batches  snapshot  checkpoints  recipe  teacher
      engine  gradients
   3  objective  fused  generation  models  lora  data  batching  tied  kv_cache  packing  vllm_worker  vllm_choice
   2  token_objective  kernel  offload  journal  diagnostics  intervals  metrics  interrupt  rundir  parts  tables
      console  sampling  attention  heads
   1  losses  curriculum  pools  ranking  on_policy  options  flags  distributed  products  files  statefile  errors
      position
"""

__version__ = "0.1.0"

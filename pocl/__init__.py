"""POCL: curriculum distillation of language models (arXiv 2506.05695).

The modules of this package stand in five layers. An import never points up, and there are no cycles:

   5  assembly  trainer  config  plan.report  plan.resolve  plan.costs
   4  gradients  micro_batches  difficulty  scoring  buckets  evaluation  vllm_backend  snapshot  recipe  teacher
      engine  run.checkpoints
   3  objective  generation  models  lora  data  batching  vllm_worker  vllm_choice  fast.fused  fast.tied
      fast.kv_cache  fast.packing
   2  token_objective  diagnostics  metrics  rundir  console  sampling  run.journal  run.interrupt  run.parts
      fast.kernel  fast.offload  fast.attention  fast.heads
   1  losses  curriculum  pools  ranking  on_policy  options  flags  distributed  files  errors  run.statefile
      run.position  run.answers  fast.products
"""

__version__ = "0.1.0"

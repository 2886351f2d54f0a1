"""Critique, revision and fine-tuning of Llama 3 8B on TPU v5e.

Command:   python launch.py --config=configs/llama3_8b_v5e.py --workdir=runs/llama3 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:4x4 slice, four hosts of four chips. No such slice was at hand: the sampling
           programs were compiled for it (`python -m experiments.compile_for_tpu
           --config=configs/llama3_8b_v5e.py --topology=v5e:4x4`; experiments/RESULTS.md)
Expected:  no oracle can judge free text, so the table gives lengths only; the texts are in the
           report (chains) and in evaluation/base and evaluation/aligned (held-out prompts).
"""

from configs import default


def get_config():
  """The config of a run on a slice."""
  config = default.get_config()
  config.model.base = 'meta-llama/Meta-Llama-3-8B-Instruct'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'

  # Each host samples on its own four chips, and there `tensor` takes all of them: parameters are
  # read once a step by each chip, so a quarter of them each, and none is gathered.
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 4

  config.sampling.initial.max_tokens = 256
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 256
  config.engine.slots = 128  # of each host
  config.engine.cache_gib = 8.0
  config.engine.prefill_chunks = (256, 64)
  config.engine.prefill_tokens = 1024

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 64
  config.train.accumulation = 4
  config.train.remat = True
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

"""Critique, revision and fine-tuning of Llama 3 8B on TPU v5e.

Command:   python launch.py --config=configs/llama3_8b_v5e.py --workdir=runs/llama3 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:8x8 slice: 16 hosts of four chips, 16 GiB each. None was at hand: all programs were
           compiled for it ahead of time (experiments/compile_for_tpu.py) and fit. The train step
           takes 9.0 of 15.75 GiB a chip, 302 ms at least and 452 ms if nothing overlaps: 145,000
           tokens/s. Sampling is each host's own: with the slots below 14.2 GiB, as on v5e:4x4,
           where the four hosts give 47,800 tokens/s at most
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

  # Training: parameters over all chips. Sampling: each host on its own four chips, where
  # `tensor` takes them all, so that a chip reads a quarter of the parameters in each step and
  # gathers none. It may not pass a host.
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 4

  config.sampling.initial.max_tokens = 256
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 256
  config.engine.slots = 208  # of each host, at up to 1,536 tokens: 14.2 of 15.75 GiB a chip
  config.engine.cache_gib = 10.0
  config.engine.prefill_tokens = 1024
  config.engine.prefill_width = 128

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 64
  config.train.accumulation = 1  # each micro-batch would gather all parameters again
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

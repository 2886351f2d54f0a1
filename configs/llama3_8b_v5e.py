"""Critique, revision and fine-tuning of Llama 3 8B on TPU v5e.

Command:   python launch.py --config=configs/llama3_8b_v5e.py --workdir=runs/llama3 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:8x8 slice: 16 hosts with four chips of 16 GiB each. We had no such slice; all
           programs were compiled for it ahead of time (experiments/aot), and they fit. The train
           step takes 4.8 of 15.75 GiB per chip and at least 302 ms, or 455 ms if nothing overlaps:
           144,000 tokens/s. Each host samples on its own: with the slots below it takes 14.2 GiB
           per chip, as on v5e:4x4, where the four hosts sample at most 47,800 tokens/s
Expected:  nothing judges free text here, so the table gives lengths only. The texts are in the
           report (chains) and in evaluation/base and evaluation/aligned (held-out prompts)
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on a v5e:8x8 slice."""
  config = default.get_config()
  config.model.base = 'meta-llama/Meta-Llama-3-8B-Instruct'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'

  # Training shards the parameters over all chips. Sampling runs on each host's four chips with
  # tensor=4, so a chip reads a quarter of the parameters per step and gathers none. `tensor` must
  # not exceed the chips of a host.
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 4

  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED, max_tokens=256)
  config.engine.slots = 208  # per host, of up to 1,536 tokens: 14.2 of 15.75 GiB per chip
  config.engine.cache_gib = 10.0

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 64
  config.train.accumulation = 1  # every micro-batch gathers all parameters again
  config.model.layers = 'scan'  # takes half of the memory, and less time to compile
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

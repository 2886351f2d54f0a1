"""Critique, revision and fine-tuning of Qwen3 0.6B on TPU v5e.

Command:   python launch.py --config=configs/qwen3_0_6b_v5e.py --workdir=runs/qwen3 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:2x4 slice: two hosts with four chips of 16 GiB each. We had no such slice; all
           programs were compiled for it ahead of time (experiments/aot), and they fit. The train
           step takes 11.4 of 15.75 GiB per chip and at least 122 ms, or 161 ms if nothing overlaps:
           203,000 tokens/s. Decoding with the slots below takes 13.6 GiB and reaches at most 33,700
           tokens/s
Expected:  nothing judges free text here, so the table gives lengths only. The texts are in the
           report (chains) and in evaluation/base and evaluation/aligned (held-out prompts)
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on a v5e:2x4 slice."""
  config = default.get_config()
  config.model.base = 'Qwen/Qwen3-0.6B'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.template_options = (('enable_thinking', False),)

  # The model is small, so every chip has a copy and only gradients are sent.
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED, max_tokens=256)
  config.engine.slots = 288  # per host, of up to 1,536 tokens: 13.6 of 15.75 GiB per chip
  config.engine.cache_gib = 12.0

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 32
  config.train.accumulation = 1
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

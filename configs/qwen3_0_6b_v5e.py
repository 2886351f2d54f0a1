"""Critique, revision and fine-tuning of Qwen3 0.6B on TPU v5e.

Command:   python launch.py --config=configs/qwen3_0_6b_v5e.py --workdir=runs/qwen3 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:2x4 slice: two hosts of four chips, 16 GiB each. None was at hand: all programs
           were compiled for it ahead of time (experiments/compile_for_tpu.py) and fit. The train
           step takes 11.4 of 15.75 GiB a chip, 122 ms at least and 161 ms if nothing overlaps:
           203,000 tokens/s. Decode with the slots below: 13.6 GiB, 33,700 tokens/s at most
Expected:  no oracle can judge free text, so the table gives lengths only; the texts are in the
           report (chains) and in evaluation/base and evaluation/aligned (held-out prompts).
"""

from configs import default


def get_config():
  """The config of a run on eight chips."""
  config = default.get_config()
  config.model.base = 'Qwen/Qwen3-0.6B'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.template_options = (('enable_thinking', False),)

  # A model for each chip: it is small, so that nothing need be sent but gradients.
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.sampling.initial.max_tokens = 256
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 256
  config.engine.slots = 288  # of each host, at up to 1,536 tokens
  config.engine.cache_gib = 12.0
  config.engine.prefill_tokens = 4096
  config.engine.prefill_width = 128

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 32
  config.train.accumulation = 1
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

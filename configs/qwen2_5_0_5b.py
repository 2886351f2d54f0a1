"""Critique, revision and fine-tuning of a real chat model, Qwen2.5-0.5B-Instruct.

Command:   python launch.py --config=configs/qwen2_5_0_5b.py --workdir=runs/qwen \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     --config.model.base=... takes any Hugging Face folder or hub name of a supported family
Hardware:  meant for one GPU with 24 GB or a TPU v5e chip; so far run only on CPUs, with small
           models
Expected:  nothing judges free text here, so the table gives lengths only. The texts are in the
           report (chains) and in evaluation/base and evaluation/aligned (held-out prompts)
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on a real checkpoint."""
  config = default.get_config()
  config.model.base = 'Qwen/Qwen2.5-0.5B-Instruct'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'

  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED, max_tokens=256)

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 16
  config.train.accumulation = 4
  config.train.remat = 'full'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

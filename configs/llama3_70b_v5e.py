"""Fine-tuning of Llama 3 70B on TPU v5e, on answers, critiques and revisions that a server gives.

Command:   python launch.py --config=configs/llama3_70b_v5e.py --workdir=runs/llama3_70b \\
             --stages=generate,train --config.remote.base.url=http://server:8000/v1 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:16x16 slice: 64 hosts of four chips, 16 GiB each. None was at hand: the train step
           was compiled for it ahead of time (experiments/compile_for_tpu.py) and fits with 13.1 of
           15.75 GiB a chip; it takes 2.8 s at least, 5.7 s if nothing overlaps: 46,300 tokens/s.
           Sampling does not fit: a host's four chips would need 33 GiB each for the parameters, so
           that M_θ is served elsewhere, and M_aligned is not evaluated here
Expected:  D_CAI, and M_aligned as a Hugging Face folder in model/.
"""

from configs import default


def get_config():
  """The config of a run on a slice."""
  config = default.get_config()
  # Four chips, which a host samples on, do not hold 70B parameters: M_θ is served elsewhere.
  config.model.base = ''
  config.model.init = 'meta-llama/Meta-Llama-3-70B-Instruct'
  config.model.dtype = 'bfloat16'
  config.remote.base.model = 'meta-llama/Meta-Llama-3-70B-Instruct'
  config.remote.base.tokenizer = 'meta-llama/Meta-Llama-3-70B-Instruct'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'

  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 4

  config.sampling.initial.max_tokens = 256
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 256

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 256
  config.train.accumulation = 4  # one row of a chip at once
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

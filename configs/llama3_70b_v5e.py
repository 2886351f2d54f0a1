"""Fine-tuning of Llama 3 70B on TPU v5e; a server provides answers, critiques and revisions.

Command:   python launch.py --config=configs/llama3_70b_v5e.py --workdir=runs/llama3_70b \\
             --stages=generate,train --config.remote.base.url=http://server:8000/v1 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:16x16 slice: 64 hosts with four chips of 16 GiB each. We had no such slice; the
           train step was compiled for it ahead of time (experiments/aot). It fits, with 13.1 of
           15.75 GiB per chip, and takes at least 2.8 s, or 5.7 s if nothing overlaps: 46,300
           tokens/s. Sampling does not fit: the parameters would take 33 GiB on each of a host's
           four chips. So a server runs M_θ, and M_aligned is not evaluated here
Expected:  D_CAI, and M_aligned as a Hugging Face folder in model/
"""

from configs import default


def get_config():
  """Return the config of a run on a v5e:16x16 slice."""
  config = default.get_config()
  # A host samples on its own four chips, which cannot hold 70B parameters, so a server runs M_θ.
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

  # A served model's generation_config.json is not read, so these are the numbers in it.
  for stage in config.sampling.values():
    stage.update(temperature=0.6, top_p=0.9, max_tokens=256)

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 256
  config.train.accumulation = 4  # one row per chip in each micro-batch
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5
  return config

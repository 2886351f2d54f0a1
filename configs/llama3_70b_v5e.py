"""Critique, revision and fine-tuning of Llama 3 70B on TPU v5e.

Command:   python launch.py --config=configs/llama3_70b_v5e.py --workdir=runs/llama3_70b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  a v5e:16x16 slice: 64 hosts with four chips of 16 GiB each. We had no such slice; all
           programs were compiled for it ahead of time (experiments/aot), and they fit. The train
           step takes 12.6 of 15.75 GiB per chip and at least 2.8 s, or 3.6 s if nothing overlaps:
           72,900 tokens/s. Sampling splits M_θ in int8 over the eight chips of two hosts, which
           makes 32 replicas. One takes 14.4 GiB per chip and at least 18 ms for a token of each of
           its 96 chains. A plan of the whole run is in experiments/RESULTS.md ("the paper's run
           with 70B"). No model in int8 was sampled over several processes yet
Expected:  nothing judges free text here, so the table gives lengths, refusals and the like. The
           texts are in the report (chains) and in evaluation/base and evaluation/aligned
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on a v5e:16x16 slice."""
  config = default.get_config()
  config.model.base = 'meta-llama/Meta-Llama-3-70B-Instruct'
  config.model.dtype = 'bfloat16'
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'

  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 4
  # `tensor` must divide the 8 key-value heads. The parameters in bf16 do not fit into 8 chips, and
  # split over 16 as fsdp=2, tensor=8 they are gathered in each step, which leaves no memory for
  # caches. Training is not concerned: it starts from the checkpoint in full precision.
  config.model.weights = 'int8'
  config.mesh_sampling.processes = 2
  config.mesh_sampling.tensor = 8

  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED, max_tokens=256)
  config.engine.slots = 96  # per replica, of up to 1,536 tokens
  config.engine.cache_gib = 5.7

  config.train.dtype = 'bfloat16'
  config.train.batch_size = 256
  config.train.accumulation = 1  # every micro-batch gathers all parameters again
  config.model.layers = 'scan'  # compiles in a minute, and keeps fewer gathered parameters
  config.train.remat = 'full'
  config.train.attention = 'splash'
  config.train.max_length = 1024
  config.train.learning_rate = 1e-5

  # Models that only score must fit into one host, and one replica alone would measure for a day
  # whether each of 731,324 revisions is on topic.
  config.feedback.topicality = False
  config.evaluation.scores = ('refused', 'looping', 'changed', 'truncated')
  return config

"""Critique, revision and fine-tuning of OLMo 3 7B on one GPU with 80 GB.

Command:   python launch.py --config=configs/olmo3_7b.py --workdir=runs/olmo3_7b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     7.30 billion parameters, all of them and their training data published (allenai)
Hardware:  meant for one GPU with 80 GB, such as an H100. Estimates, not measurements: sampling
           takes 14.6 GB of parameters (`ModelConfig.num_params`) and caches in most of the rest, 49
           GiB for 64 slots (`cai_jax.sampling.auto`). A token takes 512 KiB of the cache, because
           the model has as many key and value heads as query heads; windows of 4,096 tokens in 24
           of 32 layers do not shorten these chains. Training takes 29 GB of float32 parameters, and
           little more for adapters. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves
           only 75 % of the memory by default
Time:      a step with full rows needs 4.7e14 FLOPs (`ModelConfig.training_flops`), without what
           `remat` repeats: 1.2 s on a GPU that does 4e14 a second. Sampling has no estimate
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one GPU with 80 GB."""
  config = default.get_config()
  config.model.base = 'allenai/Olmo-3-7B-Instruct'
  config.model.dtype = 'bfloat16'  # the dtype of the checkpoint; half the memory of float32
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.helpful.source = 'helpful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 4  # as in Bai et al. (2022), section 3.2

  # What the publisher's generation_config.json recommends.
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
  # An answer that is cut at its limit is not learned. Critiques need a few sentences.
  config.sampling.initial.max_tokens = 512
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 512

  # All parameters would need 117 GB for themselves, their gradients and their moments. Adapters on
  # every linear layer learn the revisions in 29 GB and a few.
  config.train.lora_rank = 64
  config.train.lora_alpha = 64.0  # a scale of 1
  config.train.learning_rate = 1e-4  # adapters need about ten times the rate of all parameters
  config.train.dtype = 'bfloat16'
  config.train.max_length = 1024  # a prompt of up to 512 tokens with the longest answer
  config.train.batch_size = 16  # 16,384 tokens, about 40 examples of 400 tokens
  config.train.accumulation = 4  # four rows at a time
  config.train.remat = 'full'  # keeps only the inputs of the 32 layers: 1.1 GB for four rows
  config.train.attention = 'cudnn'  # keeps no square of scores; such a step is not deterministic
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  return config

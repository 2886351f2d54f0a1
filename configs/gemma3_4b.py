"""Critique, revision and fine-tuning of Gemma 3 4B on one GPU with 80 GB.

Command:   python launch.py --config=configs/gemma3_4b.py --workdir=runs/gemma3_4b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     the text half of the checkpoint, 3.88 billion parameters. Its license asks you to agree
           to terms on the hub first
Hardware:  meant for one GPU with 80 GB, such as an H100. Estimates, not measurements: sampling
           takes 7.8 GB of parameters (`ModelConfig.num_params`) and caches in most of the rest, 54
           GiB for 256 slots (`cai_jax.sampling.auto`). A token takes 136 KiB of the cache, of which
           the 29 of 34 layers with windows take 116 KiB, for at most about 1,200 tokens.
           Training takes 16 GB of float32 parameters, and little more for adapters. Set
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves only 75 % of the memory by
           default
Time:      a step with full rows needs 2.6e14 FLOPs (`ModelConfig.training_flops`), without what
           `remat` repeats: 0.7 s on a GPU that does 4e14 a second. Sampling has no estimate
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one GPU with 80 GB."""
  config = default.get_config()
  config.model.base = 'google/gemma-3-4b-it'
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

  # All parameters would need 62 GB for themselves, their gradients and their moments, which leaves
  # little for the logits of a vocabulary of 262,208.
  config.train.lora_rank = 64
  config.train.lora_alpha = 64.0  # a scale of 1
  config.train.learning_rate = 1e-4  # adapters need about ten times the rate of all parameters
  config.train.dtype = 'bfloat16'
  config.train.max_length = 1024  # a prompt of up to 512 tokens with the longest answer
  config.train.batch_size = 16  # 16,384 tokens, about 40 examples of 400 tokens
  config.train.accumulation = 4  # four rows at a time
  config.train.remat = 'full'  # keeps only the inputs of the 34 layers: 0.7 GB for four rows
  # It keeps no square of scores; such a step is not deterministic. Heads of 256 need a Hopper GPU.
  config.train.attention = 'cudnn'
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  return config

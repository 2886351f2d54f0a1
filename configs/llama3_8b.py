"""Critique, revision and fine-tuning of Llama 3 8B on one GPU with 80 GB.

Command:   python launch.py --config=configs/llama3_8b.py --workdir=runs/llama3_8b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  meant for one GPU with 80 GB, such as an H100. By the sizes of the arrays, sampling takes
           16 GB of parameters, and caches in most of the rest (128 KiB a token); training takes
           32 GB of float32 parameters, and little more for adapters. Set
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves only 75 % of the memory by
           default
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one GPU with 80 GB."""
  config = default.get_config()
  config.model.base = 'meta-llama/Meta-Llama-3-8B-Instruct'
  config.model.dtype = 'bfloat16'  # the dtype of the checkpoint; half the memory of float32
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.helpful.source = 'helpful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 4  # as in Bai et al. (2022), section 3.2

  # What the publisher recommends: temperature 0.6 and top-p 0.9.
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
  # An answer that is cut at its limit is not learned. Critiques need a few sentences.
  config.sampling.initial.max_tokens = 512
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 512

  # All parameters would need 128 GB for themselves, their gradients and their moments. Adapters on
  # every linear layer learn the revisions in 32 GB and a few.
  config.train.lora_rank = 64
  config.train.lora_alpha = 64.0  # a scale of 1
  config.train.learning_rate = 1e-4  # adapters need about ten times the rate of all parameters
  config.train.dtype = 'bfloat16'
  config.train.max_length = 1536  # a prompt of up to 1,024 tokens with the longest answer
  config.train.batch_size = 16  # 24,576 tokens, about 60 examples of 400 tokens
  config.train.accumulation = 4  # four rows at a time, whose activations fit
  config.train.remat = 'full'  # without it, the activations of four rows would not fit
  config.train.attention = 'cudnn'  # keeps no square of scores; such a step is not deterministic
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  return config

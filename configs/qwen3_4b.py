"""Critique, revision and fine-tuning of Qwen3 4B on one GPU with 80 GB.

Command:   python launch.py --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  meant for one GPU with 80 GB, such as an H100. By the sizes of the arrays, sampling takes
           8 GB of parameters, and caches in most of the rest (144 KiB a token); training takes
           64 GB of float32 parameters, gradients and moments, and 3 GB of activations. Set
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves only 75 % of the memory by
           default. If memory is short, train adapters as configs/llama3_8b.py does
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one GPU with 80 GB."""
  config = default.get_config()
  config.model.base = 'Qwen/Qwen3-4B'
  config.model.dtype = 'bfloat16'  # the dtype of the checkpoint; half the memory of float32
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.helpful.source = 'helpful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 4  # as in Bai et al. (2022), section 3.2
  # The model would think before every turn, and most replies would be cut inside their thoughts.
  config.feedback.template_options = (('enable_thinking', False),)

  # generation_config.json has the publisher's values for thinking: temperature 0.6, top-p 0.95 and
  # top-k 20. Its model card recommends these two without thinking.
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
    stage.update(temperature=0.7, top_p=0.8)
  # An answer that is cut at its limit is not learned. Critiques need a few sentences.
  config.sampling.initial.max_tokens = 512
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 512

  config.train.dtype = 'bfloat16'
  config.train.max_length = 1024  # a prompt of up to 512 tokens with the longest answer
  config.train.batch_size = 16  # 16,384 tokens, about 40 examples of 400 tokens
  config.train.accumulation = 1  # more would keep a second set of gradients, 16 GB
  config.train.remat = 'full'  # keeps only the inputs of the 36 layers: 3 GB
  config.train.attention = 'cudnn'  # keeps no square of scores; such a step is not deterministic
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  config.train.learning_rate = 1e-5  # usual for all parameters of a chat model of this size
  return config

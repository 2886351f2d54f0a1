"""Critique, revision and fine-tuning of SmolLM3 3B on one GPU with 80 GB.

Command:   python launch.py --config=configs/smollm3_3b.py --workdir=runs/smollm3_3b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     3.08 billion parameters. Every fourth layer has no rotary positions
Hardware:  meant for one GPU with 80 GB, such as an H100. Estimates, not measurements: sampling
           takes 6.2 GB of parameters (`ModelConfig.num_params`) and caches in most of the rest, 55
           GiB for 256 slots (`cai_jax.sampling.auto`); a token takes 72 KiB. Training takes 49 GB
           of float32 parameters, gradients and moments, and 2.4 GB of activations. Set
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves only 75 % of the memory by
           default. If memory is short, train adapters as configs/olmo3_7b.py does
Time:      a step with full rows needs 3.1e14 FLOPs (`ModelConfig.training_flops`), without what
           `remat` repeats: 0.8 s on a GPU that does 4e14 a second. Sampling has no estimate
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one GPU with 80 GB."""
  config = default.get_config()
  config.model.base = 'HuggingFaceTB/SmolLM3-3B'
  config.model.dtype = 'bfloat16'  # the dtype of the checkpoint; half the memory of float32
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.helpful.source = 'helpful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 4  # as in Bai et al. (2022), section 3.2
  # The model would think before every turn, and most replies would be cut inside their thoughts.
  config.feedback.template_options = (('enable_thinking', False),)

  # What the publisher's generation_config.json recommends.
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
  # An answer that is cut at its limit is not learned. Critiques need a few sentences.
  config.sampling.initial.max_tokens = 512
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 512

  config.train.dtype = 'bfloat16'
  config.train.max_length = 1024  # a prompt of up to 512 tokens with the longest answer
  config.train.batch_size = 16  # 16,384 tokens, about 40 examples of 400 tokens
  config.train.accumulation = 1  # more would keep a second set of gradients, 12 GB
  config.train.remat = 'full'  # keeps only the inputs of the 36 layers: 2.4 GB
  config.train.attention = 'cudnn'  # keeps no square of scores; such a step is not deterministic
  config.train.learning_rate = 1e-5  # usual for all parameters of a chat model of this size
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  return config

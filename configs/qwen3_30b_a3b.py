"""Critique, revision and fine-tuning of Qwen3 30B-A3B on one host of eight GPUs with 80 GB.

Command:   python launch.py --config=configs/qwen3_30b_a3b.py --workdir=runs/qwen3_30b_a3b \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     a mixture of experts: 30.5 billion parameters, of which a token uses 3.3 billion
Hardware:  meant for eight GPUs with 80 GB each, such as a host of H100s. Estimates, not
           measurements. A GPU has an eighth of the experts and a quarter of everything else, which
           is 8.0 GB for sampling, and caches in most of the rest, 54 GiB for 256 slots
           (`cai_jax.sampling.auto`); a token takes 24 KiB of each GPU. Training takes 16 GB of
           float32 parameters, and little more for adapters. Set
           XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, because jax reserves only 75 % of the memory by
           default
Time:      a step with full rows needs 2.2e14 FLOPs (`ModelConfig.training_flops`), without what
           `remat` repeats: 0.07 s if each GPU does 4e14 a second. That is a bound, because small
           products of experts and sums over GPUs are slower. Sampling has no estimate
Expected:  not run yet
"""

from cai_jax.pipeline.schema import AS_RECOMMENDED
from configs import default


def get_config():
  """Return the config of a run on one host of eight GPUs with 80 GB."""
  config = default.get_config()
  config.model.base = 'Qwen/Qwen3-30B-A3B'
  config.model.dtype = 'bfloat16'  # the dtype of the checkpoint; half the memory of float32
  config.constitution.path = 'general'
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.helpful.source = 'helpful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 4  # as in Bai et al. (2022), section 3.2
  # The model would think before every turn, and most replies would be cut inside their thoughts.
  config.feedback.template_options = (('enable_thinking', False),)

  # The model has 4 key and value heads, so `tensor` is at most 4. `expert` splits only the experts,
  # which are 95 % of the parameters. With `fsdp`, every step of sampling would gather parameters.
  config.mesh.data = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 4
  config.mesh.expert = 2

  # generation_config.json has the publisher's values for thinking: temperature 0.6, top-p 0.95 and
  # top-k 20. Its model card recommends these two without thinking.
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
    stage.update(temperature=0.7, top_p=0.8)
  # An answer that is cut at its limit is not learned. Critiques need a few sentences.
  config.sampling.initial.max_tokens = 512
  config.sampling.critique.max_tokens = 256
  config.sampling.revision.max_tokens = 512

  # All parameters would need 64 GB of each GPU for themselves, their gradients and their moments,
  # and the model before training 16 GB more. Adapters on experts are not supported.
  config.train.lora_rank = 64
  config.train.lora_alpha = 64.0  # a scale of 1
  config.train.lora_modules = 'attention/'
  config.train.learning_rate = 1e-4  # adapters need about ten times the rate of all parameters
  config.train.dtype = 'bfloat16'
  config.train.max_length = 1024  # a prompt of up to 512 tokens with the longest answer
  config.train.batch_size = 16  # 16,384 tokens, about 40 examples of 400 tokens
  config.train.accumulation = 4  # four rows at a time, and 32,768 rows of experts
  config.train.remat = 'full'  # keeps only the inputs of the 48 layers: 0.8 GB for four rows
  config.train.attention = 'cudnn'  # keeps no square of scores; such a step is not deterministic
  # The paper's share, against refusing everything: 37 helpful prompts for each 100 harmful ones.
  config.train.helpfulness_share = 0.27
  config.train.epochs = 1  # as in the paper, section 3.2
  return config

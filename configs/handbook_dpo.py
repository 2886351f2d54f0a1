"""Fine-tuning, then DPO: the recipe of the alignment-handbook for Zephyr, on a run's own D_CAI.

Command:   python launch.py --config=configs/handbook_dpo.py --workdir=runs/handbook \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Hardware:  8 GPUs with 80 GB, as the handbook asks for. We had no such machine, so this config has
           not been run at full size
Expected:  no result at full size. The handbook fine-tunes on UltraChat and learns the preferences
           of UltraFeedback; here both come from the run's own revisions. To learn another file of
           preferences, set --config.prefer.data=FILE

Hyper-parameters are those of huggingface/alignment-handbook at commit 925acdf:
  recipes/zephyr-7b-beta/sft/config_full.yaml: Mistral 7B v0.1, learning rate 2e-5 with a cosine
    schedule and warm-up over 10 % of the steps, one epoch, bf16, sequences of at most 2,048 tokens,
    16 sequences on each of 8 GPUs
  recipes/zephyr-7b-beta/dpo/config_full.yaml: DPO with β = 0.01, learning rate 5e-7 with a cosine
    schedule and warm-up over 10 %, one epoch, sequences of at most 1,024 tokens, batches of
    8 GPUs × 8 pairs × 2 steps of accumulation = 128 pairs
  recipes/constitutional-ai/dpo/config_anthropic.yaml, the handbook's Constitutional AI: DPO with
    β = 0.1, learning rate 5e-7 with a linear schedule, 3 epochs, RMSprop, 8 GPUs × 2 pairs. To use
    its schedule: --config.prefer.epochs=3 --config.prefer.schedule=linear \\
    --config.prefer.options="(('beta', 0.1),)"
What differs here:
  rows are packed. A row of 2,048 tokens holds several sequences or pairs, so batch_size is smaller:
    32 rows hold about 128 sequences of 512 tokens, or 128 pairs of 256 tokens a side. To check,
    read examples / steps of stage train in the manifest, and units / steps of stage prefer
  a pair that does not fit is dropped and counted; the handbook cuts prompts at 512 tokens
  AdamW with the defaults of the Trainer that TRL extends: b2 = 0.999, no weight decay, gradients
    clipped at norm 1
  M_θ is the handbook's own fine-tuned model, zephyr-7b-sft-full, the result of its first step. It
    answers, critiques and revises, has the handbook's chat template, and is fine-tuned further on
    the revisions with the settings of that step
"""

from configs import default


def get_config():
  """Return the config of the handbook's recipe."""
  config = default.get_config()
  config.model.base = 'alignment-handbook/zephyr-7b-sft-full'
  config.model.dtype = 'bfloat16'
  config.mesh.update(data=1, fsdp=-1)
  config.prompts.harmful.source = 'harmful.jsonl'
  config.prompts.eval_harmful.source = 'held_out.jsonl'
  config.feedback.rounds = 1  # one critique and one revision, as llm-swarm samples them
  for stage in config.sampling.values():
    stage.max_tokens = 512

  config.prefer.data = 'implied'
  config.prefer.objective = 'dpo'
  config.prefer.options = (('beta', 0.01),)
  config.prefer.init = 'aligned'
  config.train.learning_rate = 2e-5
  config.prefer.learning_rate = 5e-7
  for section in (config.train, config.prefer):
    section.epochs = 1
    section.schedule = 'cosine'
    section.warmup = 0.1
    section.max_length = 2048
    section.batch_size = 32
    section.b2 = 0.999
    section.clip_norm = 1.0
    section.dtype = 'bfloat16'
    section.remat = 'full'
  return config

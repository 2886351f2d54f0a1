"""SL-CAI by the recipe of Bai et al. 2022 (arXiv:2212.08073), with open weights.

Command:   python launch.py --config=configs/bai2022_sl_cai.py --workdir=runs/bai2022 \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl \\
             --config.constitution.path=ConstitutionalHarmlessnessPaper/prompts
Scaled:    the same recipe on one machine, with a small model, a few prompts and short replies:
           python launch.py --config=configs/bai2022_sl_cai.py --workdir=runs/small \\
             --config.model.base=MODEL --config.model.init=MODEL --config.model.dtype=float32 \\
             --config.mesh.fsdp=1 --config.mesh.tensor=1 \\
             --config.constitution.path=ConstitutionalHarmlessnessPaper/prompts \\
             --config.prompts.harmful.source=harmful.jsonl --config.prompts.harmful.limit=4 \\
             --config.prompts.helpful.source=helpful.jsonl --config.prompts.helpful.limit=3 \\
             --config.prompts.eval_harmful.source=held_out.jsonl \\
             --config.sampling.initial.max_tokens=32 --config.sampling.critique.max_tokens=32 \\
             --config.sampling.revision.max_tokens=32 --config.engine.slots=4 \\
             --config.feedback.max_rate.truncated=1 \\
             --config.train.dtype=float32 --config.train.attention=blocks \\
             --config.train.remat=none --config.train.batch_size=4 \\
             --config.train.accumulation=1 --config.train.max_length=512
Hardware:  that of configs/llama3_8b_v5e.py, v5e:8x8. A train step takes 9.3 of 15.75 GiB per chip
           and at least 1.2 s, or 1.4 s if nothing overlaps (experiments/aot). We had no such slice,
           so this config has not been run at full size
Expected:  no result at full size. Training uses at most 731,324 revisions and 270,592 helpful
           responses (27 % of the total). If --config.report.published names one of the paper's
           sample files, quality.json compares the revisions with the paper's own

You provide the prompt files and the constitution: only part of the paper's prompts is public. The
constitution and its demonstrations are the folder prompts/ of
anthropics/ConstitutionalHarmlessnessPaper.

From the paper; each line was checked against the text of the section, and those with a star also
against the published files:
  16 principles *; each round of each prompt samples one of them             section 3.1
  few-shot demonstrations before critiques and revisions (5 *)               section 3.1, appendix E
  a round sees the prompt and the latest response, like the first round      section 3.1
  a pre-trained model is fine-tuned on the revisions of all rounds and on
    the helpful responses                                                    section 3.1
  182,831 red-team prompts: 42,496 written by people, 140,335 by a model     section 3.2
  4 rounds * per prompt by a helpful RLHF model                              section 3.2
  135,296 helpful prompts by people, 2 responses each by that model          section 3.2
  temperature 1, always                                                      section 3.2
  1 epoch, constant learning rate of 0.5 of the pre-training's               section 3.2
  batches of 1,024 sequences                                                 section 3.2
The paper does not state how long replies may be, the optimizer, weight decay or gradient clipping.
Our assumptions:
  Llama 3 8B Instruct stands in for the helpful RLHF model and Llama 3 8B for the pre-trained one;
    the paper's models have up to 52B parameters and are not public
  learning rate 1.5e-4: half of Llama 3 8B's peak of 3e-4 (Llama Team 2024, arXiv:2407.21783,
    table 3), without warm-up since the paper's rate is constant
  256 packed rows per step. A step holds about batch_size × max_length / (mean tokens per example)
    sequences, which is 1,024 at a mean of 256 tokens. To check, read examples / steps of stage
    train in the manifest; to correct, set batch_size to 256 × 1,024 / that number
  replies of at most 256 tokens; truncated replies are not trained on; rows of 1,024 tokens
  the labels Human: and Assistant:, as in the published files
  AdamW without weight decay, gradients clipped at norm 1
"""

from configs import default, llama3_8b_v5e

HARMFUL = 42_496 + 140_335  # prompts by people and by a model
HELPFUL = 135_296  # prompts
HELPFUL_SAMPLES = 2  # responses to each helpful prompt
ROUNDS = 4


def get_config():
  """Return the config of the paper's supervised phase."""
  config = llama3_8b_v5e.get_config()
  config.model.base = 'meta-llama/Meta-Llama-3-8B-Instruct'
  config.model.init = 'meta-llama/Meta-Llama-3-8B'
  config.constitution.path = 'ConstitutionalHarmlessnessPaper/prompts'
  config.prompts.harmful.update(source='harmful.jsonl', limit=HARMFUL)
  config.prompts.helpful.update(source='helpful.jsonl', limit=HELPFUL)

  config.feedback.rounds = ROUNDS
  config.feedback.context = 'fresh'
  config.feedback.repeat_principles = True
  config.feedback.demonstrations = True
  config.feedback.style = 'plain'
  config.feedback.helpful_samples = HELPFUL_SAMPLES
  config.sampling = default.get_config().sampling  # no filter and no penalty
  for stage in config.sampling.values():
    stage.temperature = 1.0

  responses = HELPFUL_SAMPLES * HELPFUL
  config.train.target = 'all'
  config.train.helpfulness_share = responses / (responses + ROUNDS * HARMFUL)
  config.train.epochs = 1
  config.train.schedule = 'constant'
  config.train.warmup = 0.0
  config.train.learning_rate = 0.5 * 3e-4
  config.train.batch_size = 256
  return config

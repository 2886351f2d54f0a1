"""AI feedback and the preference model of Bai et al. 2022 (arXiv:2212.08073), section 4.

The paper trains a policy by reinforcement learning against the preference model. This config trains
the preference model, and DPO on the same labels in place of reinforcement learning.

Command:   python launch.py --config=configs/bai2022_rl_cai_feedback.py --workdir=runs/feedback \\
             --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.helpful.source=helpful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Files:     a copy of anthropics/ConstitutionalHarmlessnessPaper in the working directory. If it is
           elsewhere, set --config.constitution.path and --config.label.constitution
Thoughts:  the paper's chain-of-thought labels: --config.label.thoughts=256 clamps each probability
           to 40-60 %, as the paper found to work better than unclamped ones
Hardware:  that of configs/bai2022_sl_cai.py. We had no such machine, so this config has not been
           run at full size
Expected:  no result at full size

From the paper (section 4.1 unless another one is given; the counts of section 4.2 are unverified,
because we read them in secondary sources only):
  two responses of the SL-CAI model to each prompt, one comparison for each prompt
  16 principles for comparisons, one of which is drawn for each comparison (the published file
    RLMadisonInstructions.json has them)
  the feedback model is a pre-trained language model; the label is its normalised probability of the
    two options
  182,831 comparisons of harmlessness, one for each SL-CAI prompt; section 4.2
  135,296 comparisons of helpfulness by people; section 4.2
  the preference model starts from a pre-trained language model, as in Bai et al. 2022a; section 3.3
Our assumptions:
  Llama 3 8B Instruct samples and Llama 3 8B gives feedback, as in configs/bai2022_sl_cai.py
  the comparisons of helpfulness are not public in the paper's form. Add them in a file with
    harmlessness labels (`reward.data`); here the model learns the labels of harmlessness alone
  learning rate 1e-5 for one epoch with a cosine schedule; the paper states neither
  DPO with β = 0.1 for one epoch at 5e-7, in place of reinforcement learning
"""

from configs import bai2022_sl_cai


def get_config():
  """Return the config of the labels and the preference model of the paper."""
  config = bai2022_sl_cai.get_config()
  config.label.responses = 2
  config.label.sampled_by = 'aligned'
  config.label.model = 'meta-llama/Meta-Llama-3-8B'  # a pre-trained model
  config.label.constitution = 'ConstitutionalHarmlessnessPaper/prompts/RLMadisonInstructions.json'
  config.label.style = 'plain'

  config.reward.data = config.prefer.data = 'labels'
  for section in (config.reward, config.prefer):
    section.max_length = 2048  # both sides of a comparison
    section.batch_size = 128
    section.dtype = config.train.dtype
    section.remat = config.train.remat
    section.attention = config.train.attention
  config.reward.init = 'meta-llama/Meta-Llama-3-8B'
  config.reward.learning_rate = 1e-5

  config.prefer.objective = 'dpo'
  config.prefer.options = (('beta', 0.1),)
  config.prefer.learning_rate = 5e-7
  config.prefer.warmup = 0.1

  config.evaluation.style = 'plain'
  config.evaluation.reward_model = 'trained'
  config.evaluation.baselines = ('best_of_reward',)
  config.evaluation.best_of_n = 16
  return config

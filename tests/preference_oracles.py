"""The objectives of preference training in plain PyTorch, each written from its paper's formula.

They share no code with the package. `chosen` and `rejected` are the log-probabilities of the
responses under the policy, summed over the tokens of a response, and `reference_*` those under the
reference model, each f32[P] for P pairs. Every function returns one loss for each pair or response,
which training averages.
"""

import dataclasses

import torch
from torch.nn.functional import logsigmoid


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What the losses of P comparisons need to know, each f32[P].

  Attributes:
    chosen: log π(y_w | x), summed over tokens.
    rejected: log π(y_l | x).
    chosen_length: number of tokens |y_w|, with the one that ends the response.
    rejected_length: |y_l|.
    reference_chosen: log π_ref(y_w | x).
    reference_rejected: log π_ref(y_l | x).
    probability: that y_w is the better response.
  """

  chosen: torch.Tensor
  rejected: torch.Tensor
  chosen_length: torch.Tensor
  rejected_length: torch.Tensor
  reference_chosen: torch.Tensor
  reference_rejected: torch.Tensor
  probability: torch.Tensor

  @property
  def chosen_ratio(self):
    return self.chosen - self.reference_chosen

  @property
  def rejected_ratio(self):
    return self.rejected - self.reference_rejected


def cross_entropy(logit, probability):
  """Return -p log σ(logit) - (1 - p) log σ(-logit)."""
  return -probability * logsigmoid(logit) - (1 - probability) * logsigmoid(-logit)


def dpo(pairs, beta, flip_rate=0.0):
  """DPO with soft labels.

  With p = 1 it is equation 7 of Rafailov et al. 2023. A smaller p is the conservative loss of
  Mitchell 2023 ("A note on DPO with noisy preferences"), where p = 1 - ε. A flip rate ε above 0 is
  the loss of Chowdhury et al. 2024 (robust DPO), whose mean over flipped labels is that of the true
  ones: ((1 - ε) L(y_w ≻ y_l) - ε L(y_l ≻ y_w)) / (1 - 2ε).
  """
  logit = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
  given = cross_entropy(logit, pairs.probability)
  flipped = cross_entropy(-logit, pairs.probability)
  return ((1 - flip_rate) * given - flip_rate * flipped) / (1 - 2 * flip_rate)


def length_normalized_dpo(pairs, beta):
  """DPO whose log-ratios are means over tokens (Lambert et al. 2024, Tülu 3)."""
  chosen = pairs.chosen_ratio / pairs.chosen_length
  rejected = pairs.rejected_ratio / pairs.rejected_length
  return cross_entropy(beta * (chosen - rejected), pairs.probability)


def ipo(pairs, beta, normalized=False):
  """IPO, equation 17 of Azar et al. 2023: (h - 1/(2τ))², with τ = β, and its mean over labels.

  Args:
    pairs: the pairs.
    beta: τ.
    normalized: whether h has means over tokens, as in TRL. The paper has sums.
  """
  scale = (pairs.chosen_length, pairs.rejected_length) if normalized else (1, 1)
  h = pairs.chosen_ratio / scale[0] - pairs.rejected_ratio / scale[1]
  p = pairs.probability
  return p * (h - 0.5 / beta) ** 2 + (1 - p) * (h + 0.5 / beta) ** 2


def orpo(pairs, weight):
  """ORPO, equations 6 and 7 of Hong et al. 2024: L_SFT + λ L_OR.

  log P(y | x) is the mean over tokens (equation 3), odds are P / (1 - P) (equation 4), and L_SFT is
  -log P(y_w | x). A soft label is the mean of both hard ones.
  """
  chosen = pairs.chosen / pairs.chosen_length
  rejected = pairs.rejected / pairs.rejected_length
  odds = lambda mean: mean.exp() / (1 - mean.exp())  # noqa: E731
  chosen_wins = -chosen - weight * logsigmoid(torch.log(odds(chosen) / odds(rejected)))
  rejected_wins = -rejected - weight * logsigmoid(torch.log(odds(rejected) / odds(chosen)))
  return pairs.probability * chosen_wins + (1 - pairs.probability) * rejected_wins


def simpo(pairs, beta, gamma):
  """SimPO, equation 6 of Meng et al. 2024. A soft label is the mean of both hard ones."""
  chosen = beta / pairs.chosen_length * pairs.chosen
  rejected = beta / pairs.rejected_length * pairs.rejected
  chosen_wins = -logsigmoid(chosen - rejected - gamma)
  rejected_wins = -logsigmoid(rejected - chosen - gamma)
  return pairs.probability * chosen_wins + (1 - pairs.probability) * rejected_wins


def kto(ratio, mismatched_ratio, desirable, beta, desirable_weight=1.0, undesirable_weight=1.0):
  """KTO, equation 7 of Ethayarajh et al. 2024: λ_y - v(x, y).

  v is λ_D σ(β (r - z)) for a desirable response and λ_U σ(β (z - r)) for another one, where r is
  log π(y|x) / π_ref(y|x). The reference point z is max(0, mean r of mismatched prompts and
  responses), an estimate of the divergence from the reference into which no gradient flows.

  Args:
    ratio: r of each response, f32[N].
    mismatched_ratio: r of a response to another prompt, f32[N].
    desirable: bool[N].
    beta, desirable_weight, undesirable_weight: β, λ_D, λ_U.
  """
  z = mismatched_ratio.mean().clamp(min=0).detach()
  gains = desirable_weight * (1 - torch.sigmoid(beta * (ratio - z)))
  losses = undesirable_weight * (1 - torch.sigmoid(beta * (z - ratio)))
  return torch.where(desirable, gains, losses)


def bradley_terry(chosen, rejected, probability, margin=0.0, centering=0.0):
  """The loss of a reward model that gives scores f32[P].

  -log σ(r_w - r_l - m) is equation 2 of Touvron et al. 2023 (Llama 2) with the margin m, here with
  soft labels. centering × (r_w + r_l)² keeps the mean of a pair's scores near 0 (Eisenstein et al.
  2023, "Helping or Herding?", equation 2).
  """
  return (
    cross_entropy(chosen - rejected - margin, probability) + centering * (chosen + rejected) ** 2
  )

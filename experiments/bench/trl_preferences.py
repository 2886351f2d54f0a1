"""Run the preference benchmark's steps with `DPOTrainer` of TRL, on all parameters.

Two settings are measured. The fastest one that does not change the optimization has precomputed
log-probabilities of the reference, no gradient checkpointing, and micro-batches of pairs of similar
length. The default one keeps a reference model, computes it in each step, and checkpoints
gradients. Both have torch's fused AdamW and no evaluation, reports or checkpoints. The benchmark
makes the micro-batches, so that each step has the pairs that it should have. The call to `train`
includes what the trainer does around its steps, such as its metrics.
"""

import itertools
import pathlib
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.bench import examples as examples_lib
from experiments.bench import pairs as pairs_lib
from experiments.bench.examples import Example, Rows

PACKAGES = ('torch', 'transformers', 'trl', 'accelerate')
REFERENCE_BATCH = 8  # pairs


class Trainer(trl.DPOTrainer):
  """`DPOTrainer` on pairs of token ids."""

  def _prepare_dataset(self, dataset, *args, **kwargs):
    return dataset


class System:
  """TRL's trainer with one model.

  Args:
    folder: the model's folder.
    dtype: 'bfloat16' computes under autocast; parameters and moments are f32.
    platform: 'cpu' or 'cuda'.
    options: `precomputed`, whether the reference is; `checkpointing` of gradients; `attention`, the
      model's attention implementation; `beta`; and `optimizer`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    self.precomputed = options['precomputed']
    settings = options['optimizer']
    self.examples: list[Example] = []

    def load():
      return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=options['attention']
      )

    model = load()
    optimizer = torch.optim.AdamW(
      model.parameters(),
      lr=settings['learning_rate'],
      betas=(settings['b1'], settings['b2']),
      eps=settings['eps'],
      weight_decay=settings['weight_decay'],
      fused=True,
    )
    config = trl.DPOConfig(
      output_dir=tempfile.mkdtemp(),
      beta=options['beta'],
      precompute_ref_log_probs=False,  # `take` does this, for pairs that come later
      max_length=None,
      train_sampling_strategy='sequential',
      remove_unused_columns=False,
      per_device_train_batch_size=1,
      learning_rate=settings['learning_rate'],
      lr_scheduler_type='constant',
      max_grad_norm=settings['clip_norm'],
      bf16=dtype == 'bfloat16',
      gradient_checkpointing=options['checkpointing'],
      max_steps=1,
      logging_steps=1,
      save_strategy='no',
      report_to='none',
      disable_tqdm=True,
      use_cpu=self.device == 'cpu',
      dataloader_pin_memory=self.device != 'cpu',
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    self.trainer = Trainer(
      model,
      ref_model=None if self.precomputed else load(),
      args=config,
      train_dataset=datasets.Dataset.from_list([{'prompt_ids': [1], 'chosen_ids': [2]}]),
      processing_class=transformers.AutoTokenizer.from_pretrained(folder),
      optimizers=(optimizer, schedule),
    )
    # An item of the dataset is a micro-batch, so the trainer's batches have one item.
    collate = self.trainer.data_collator
    self.collate = lambda items: collate(items[0])
    self.trainer.data_collator = self.collate
    if self.precomputed:  # as after `precompute_ref_log_probs=True`
      self.trainer.precompute_ref_logps, self.trainer.ref_model = True, None

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Store the pairs and the rows of each step, and compute the reference of new pairs."""
    self.steps = steps
    if examples == self.examples:
      return
    self.examples = examples
    self.pairs = [
      {
        'prompt_ids': chosen.tokens[: chosen.prompt],
        'chosen_ids': chosen.tokens[chosen.prompt :],
        'rejected_ids': rejected.tokens[rejected.prompt :],
      }
      for chosen, rejected in pairs_lib.pair_up(examples)
    ]
    if self.precomputed:
      self._compute_reference([[i] for i in range(len(self.pairs))], REFERENCE_BATCH)

  def reference(self, first: int, stop: int, batch: int) -> None:
    """Compute the reference's log-probabilities of the pairs of steps [first, stop) once more.

    It takes the same time with the trained parameters, which the result is not used with.
    """
    rows = [row for step in self.steps[first:stop] for row in step]
    self._compute_reference(rows, batch or len(rows), keep=False)

  def _compute_reference(self, rows: Rows, batch: int, keep: bool = True) -> None:
    for pairs in self._split(rows, batch):
      inputs = {name: x.to(self.device) for name, x in self.collate([pairs]).items()}
      sides = self.trainer.compute_ref_log_probs(self.trainer.model, inputs)
      for pair, chosen, rejected in zip(pairs, *(side.tolist() for side in sides), strict=True):
        if keep:
          pair |= {'ref_chosen_logps': chosen, 'ref_rejected_logps': rejected}

  def _split(self, rows: Rows, batch: int) -> list[list[dict]]:
    """Return micro-batches of pairs, which are sorted by their longer side."""
    order = sorted(rows, key=lambda row: _longest(self.pairs[row[0]]))
    return [[self.pairs[i] for (i,) in part] for part in examples_lib.split(order, batch)]

  def warm(self, batch: int) -> int:
    """Train on one step and return 1: nothing is compiled, so shapes do not matter."""
    self.train(0, 1, batch)
    return 1

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """Train on steps [first, stop).

    Args:
      first, stop: range of steps.
      batch: pairs of a micro-batch; 0 means the whole step.

    Returns:
      The loss of each step, and the number of tokens computed, padding included.
    """
    losses, places = [], 0
    steps = [self._split(rows, batch) for rows in self.steps[first:stop]]
    for count, group in itertools.groupby(steps, len):  # a call has steps of equally many
      micro_batches = [pairs for step in group for pairs in step]
      trainer = self.trainer
      trainer.train_dataset = micro_batches
      trainer.args.gradient_accumulation_steps = count
      trainer.args.max_steps = len(micro_batches) // count
      trainer.train()
      losses += [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
      places += sum(2 * len(pairs) * max(map(_longest, pairs)) for pairs in micro_batches)
    return losses, places

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()


def _longest(pair: dict[str, list[int]]) -> int:
  """Return the number of tokens of the longer side of a pair."""
  return len(pair['prompt_ids']) + max(len(pair['chosen_ids']), len(pair['rejected_ids']))

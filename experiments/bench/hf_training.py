"""The training benchmark's steps through a model of Hugging Face transformers.

A step is what their Trainer makes of it: micro-batches whose losses are sums over the tokens to
learn, divided by the number of these in the whole step; gradients clipped by their norm; AdamW of
torch, fused.
"""

import contextlib
import pathlib
from typing import Any

import torch
import transformers

from experiments.bench import examples as examples_lib
from experiments.bench.examples import Example, Rows

PACKAGES = ('torch', 'transformers')
IGNORED = -100  # label of a token that is not learnt


class System:
  """A model of transformers with its optimizer.

  Args:
    folder: of the model.
    dtype: 'bfloat16' computes under autocast; parameters and moments are f32.
    options: `packed`; `attention`, of 'sdpa' and 'eager'; `optimizer`.

  Padded, a micro-batch is so many examples filled up to the longest of them. Packed, it is so many
  rows laid one after the other in a single one without padding, with positions that begin again at
  each example and no attention mask: transformers finds from that which tokens belong together, and
  masks the others.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation=options['attention']
    )
    self.model = model.to(self.device).train()
    self.packed = options['packed']
    self.half = dtype == 'bfloat16'
    settings = options['optimizer']
    self.clip_norm = settings['clip_norm']
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=settings['learning_rate'],
      betas=(settings['b1'], settings['b2']),
      eps=settings['eps'],
      weight_decay=settings['weight_decay'],
      fused=True,
    )

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Keeps the examples, and the rows of each step."""
    self.examples, self.steps = examples, steps

  def warm(self, batch: int) -> int:
    """Trains on one step; the number of shapes, which are all alike where nothing is compiled."""
    self.train(0, 1, batch)
    return 1

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """(losses of the steps, tokens computed), with `batch` rows in a micro-batch; 0 is all."""
    losses, places = [], 0
    for rows in self.steps[first:stop]:
      parts = examples_lib.split(rows, batch)
      batches = [self._pack(part) if self.packed else self._pad(part) for part in parts]
      losses.append(self._step(batches))
      places += sum(b['input_ids'].numel() for b in batches)
    return losses, places

  def _pad(self, rows: Rows) -> dict[str, torch.Tensor]:
    examples = [self.examples[i] for row in rows for i in row]
    tokens, real, learnt = map(
      torch.tensor, examples_lib.pad(examples, max(len(e.tokens) for e in examples))
    )
    labels = torch.where(learnt != 0, tokens, IGNORED)
    return {'input_ids': tokens.long(), 'attention_mask': real.long(), 'labels': labels.long()}

  def _pack(self, rows: Rows) -> dict[str, torch.Tensor]:
    tokens, labels, positions = [], [], []
    for example in (self.examples[i] for row in rows for i in row):
      tokens += example.tokens
      labels += [IGNORED] * example.prompt + example.tokens[example.prompt :]
      positions += range(len(example.tokens))
    named = {'input_ids': tokens, 'labels': labels, 'position_ids': positions}
    return {name: torch.tensor([ids]) for name, ids in named.items()}

  def _step(self, batches: list[dict[str, torch.Tensor]]) -> float:
    """The loss of an optimizer step."""
    targets = sum(int((b['labels'][:, 1:] != IGNORED).sum()) for b in batches)
    half = torch.autocast(self.device, torch.bfloat16) if self.half else contextlib.nullcontext()
    loss = 0.0
    for arrays in batches:
      arrays = {name: x.to(self.device) for name, x in arrays.items()}
      with half:
        part = self.model(**arrays, use_cache=False, num_items_in_batch=targets).loss
      part.backward()
      loss += part.item()
    if self.clip_norm:
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return loss

  def device_peak_bytes(self) -> int | None:
    """Most memory of the accelerator in use so far; None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()

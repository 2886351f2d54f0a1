"""Run the benchmark's chains with OpenVINO GenAI.

The recipe of its environment is in `experiments.bench.generation`.
"""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import openvino
import openvino_genai

from experiments.bench import chains as chains_lib
from experiments.bench.chains import Chain

PACKAGES = ('openvino', 'openvino-genai', 'optimum-intel')
PRECISIONS = {'float32': 'f32', 'bfloat16': 'bf16'}


def export(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Export a model's folder to `target` with f32 weights, unless that was done before.

  Precision is chosen when the model is compiled.
  """
  done = target / 'done'  # written last, because its presence marks the export as complete
  if done.exists():
    return
  command = [str(pathlib.Path(sys.executable).with_name('optimum-cli')), 'export', 'openvino']
  command += ['--model', str(folder), '--task', 'text-generation-with-past']
  command += ['--weight-format', 'fp32', '--disable-convert-tokenizer', str(target)]
  subprocess.run(command, check=True, stdout=sys.stderr)
  done.touch()


class System:
  """OpenVINO's continuous batching, with its prefix cache.

  A chain's next turn is submitted as soon as its reply has ended, so that replies and prompts share
  steps. Every run has a new pipeline, whose making is not timed, because its prefix cache cannot be
  emptied.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    if platform != 'cpu':
      raise ValueError('openvino runs on CPUs only.')
    self.folder = pathlib.Path(options['export'])
    export(folder, self.folder)
    precision = PRECISIONS[dtype]
    # The cache's default is 8 bits.
    self.properties = {'INFERENCE_PRECISION_HINT': precision, 'KV_CACHE_PRECISION': precision}
    self.cache_gib, self.step_tokens = options['cache_gib'], options['step_tokens']
    self.pipe = None

  def prepare(self, batch: int, length: int) -> None:
    """Make a pipeline for `batch` chains."""
    del length
    self.pipe = None  # frees its memory first
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = self.cache_gib
    scheduler.enable_prefix_caching = True
    scheduler.max_num_seqs = batch
    scheduler.max_num_batched_tokens = self.step_tokens
    self.pipe = openvino_genai.ContinuousBatchingPipeline(
      str(self.folder), scheduler, 'CPU', self.properties
    )

  def run(
    self, chains: list[Chain], prefix: list[int], batch: int, seed: int, warm: bool = False
  ) -> tuple[list[list[list[int]]], dict]:
    """Run all chains, `batch` at a time; see `chains.Run`. Nothing is compiled during a run."""
    chains = chains[: chains_lib.WARM] if warm else chains
    return self._roll(chains, prefix, batch, do_sample=True, rng_seed=seed), {}

  def _roll(self, chains, prefix, batch, do_sample, rng_seed):
    handles, numbers = {}, {}

    def submit(request, context, limit):
      number = numbers[request] = len(numbers)
      config = openvino_genai.GenerationConfig()
      config.max_new_tokens, config.ignore_eos = limit, True
      if do_sample:
        config.do_sample, config.temperature = True, 1.0
        config.top_p, config.top_k = 1.0, 2**31 - 1
        config.rng_seed = rng_seed * 1_000_003 + number
      ids = openvino.Tensor(np.array([context], np.int64))
      handles[request] = self.pipe.add_request(number, ids, config)

    def poll():
      self.pipe.step()
      running = openvino_genai.GenerationStatus.RUNNING
      ended = [request for request, h in handles.items() if h.get_status() != running]
      return [(r, handles.pop(r).read_all()[0].generated_ids) for r in ended]

    return chains_lib.run_rolling(chains, prefix, batch, submit, poll)

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Return the logits f32[B,V] after the last of tokens i32[B,T].

    They are those of the exported model itself, because the pipeline does not return them.
    """
    properties = {'INFERENCE_PRECISION_HINT': self.properties['INFERENCE_PRECISION_HINT']}
    model = openvino.Core().compile_model(self.folder / 'openvino_model.xml', 'CPU', properties)
    b, t = tokens.shape
    inputs = {
      'input_ids': tokens.astype(np.int64),
      'attention_mask': np.ones((b, t), np.int64),
      'position_ids': np.tile(np.arange(t), (b, 1)),
      'beam_idx': np.arange(b, dtype=np.int32),
    }
    names = {name for port in model.inputs for name in port.names}
    out = model.create_infer_request().infer({k: v for k, v in inputs.items() if k in names})
    return np.asarray(out['logits'][:, -1], np.float32)

  def greedy(self, tokens: np.ndarray, count: int) -> list[list[int]]:
    """Return `count` greedily decoded tokens after each row of tokens i32[B,T]."""
    self.prepare(len(tokens), tokens.shape[1] + count)
    chains = [Chain(str(i), row.tolist(), [], [count]) for i, row in enumerate(tokens)]
    return [r[0] for r in self._roll(chains, [], len(chains), do_sample=False, rng_seed=0)]

  def device_peak_bytes(self) -> int | None:
    """Return None, because it runs on CPUs only."""
    return None

"""How often a feedback model prefers the better response of published pairs.

  python -m experiments.bench.label_accuracy --model=FOLDER --pairs=harmless-base-test.jsonl.gz \\
    --form=hh_rlhf --limit=100 --constitution=RLMadisonInstructions.json --folder=out

The labels, their readings and the summary are in the folder, with a journal that makes another
start ask nothing twice.
"""

import argparse
import contextlib
import pathlib
import time

from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.job import check_label
from cai_jax.feedback.comparisons.labelling import label
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.model import lm as models
from cai_jax.runtime.terminal import say
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig


def main() -> None:
  """Label the pairs and print what the labels are worth."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', required=True, help='folder or hub name of the feedback model')
  parser.add_argument('--pairs', required=True, help='file of pairs whose better response is known')
  parser.add_argument('--form', default='trl', help='form of the file')
  parser.add_argument('--limit', type=int, default=100, help='number of pairs')
  parser.add_argument('--constitution', default='general', help='its principles are drawn')
  parser.add_argument('--principles', type=int, default=1, help='principles of each pair')
  parser.add_argument('--thoughts', type=int, default=0, help='tokens of a chain of thought')
  parser.add_argument('--demonstrations', default='', help='file of few-shot demonstrations')
  parser.add_argument('--slots', type=int, default=8, help='slots of the engine')
  parser.add_argument('--folder', required=True, type=pathlib.Path, help='folder of the results')
  flags = parser.parse_args()
  config = LabelConfig(
    comparisons=(flags.pairs,),
    form=flags.form,
    comparisons_limit=flags.limit,
    principles=flags.principles,
    thoughts=flags.thoughts,
    demonstrations=flags.demonstrations,
  )
  constitution = load_constitution(ConstitutionConfig(flags.constitution))
  lm = models.load(flags.model)
  job = check_label(
    {'feedback': lm}, [], constitution, config, FeedbackConfig(), SamplingConfig(), seed=0
  )
  say(f'{len(job.items)} pairs, contexts of up to {job.length} tokens')
  begin = time.perf_counter()

  def show(done: int, total: int, tokens: int) -> None:
    if done % 10 == 0:
      say(f'{done} of {total} pairs, {time.perf_counter() - begin:.0f} s')

  with contextlib.closing(Journal(flags.folder / 'journal')) as journal:
    sizes = EngineConfig(slots=flags.slots)
    summary = label(job, flags.folder, journal, sizes, show)
  say(str(summary))


if __name__ == '__main__':
  main()

"""A language model as the judge of the published HHH questions (Askell et al. 2021).

  python -m experiments.bench.hhh_judge --model=FOLDER --file=438HHHEvaluations.jsonl

The model reads each pair in both orders through its chat template, the shortest pairs first. The
script prints how many pairs were read, accuracy and its Wilson interval, the mass of the labels,
the preference for a label, and the time.
"""

import argparse
import pathlib
import time

from cai_jax.evaluation.judge_labels import read_labelled
from cai_jax.evaluation.judge_validity import find_biases, judge_status, score_labelled
from cai_jax.evaluation.length_bias import length_bias, length_differences
from cai_jax.model import lm as models
from cai_jax.runtime.files import write_json
from cai_jax.runtime.terminal import say
from cai_jax.scoring import judge_local, judge_questions

PRINCIPLE = 'Choose the answer that is better.'  # of rows without one; the published rows have one
BLOCK = 25  # pairs between two lines of progress


def main() -> None:
  """Judge the pairs and print what the judge is worth."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', required=True, help='folder or hub name of the judge')
  parser.add_argument('--file', required=True, help='file of labelled pairs')
  parser.add_argument('--limit', type=int, default=-1, help='number of pairs; -1 reads all')
  parser.add_argument('--most_tokens', type=int, default=2048, help='leave longer questions out')
  parser.add_argument('--output', help='JSON file of the results')
  flags = parser.parse_args()
  labelled = read_labelled(flags.file, PRINCIPLE)
  lm = models.load(flags.model)
  dialogue = judge_local.judge_dialogue(lm.tokenizer, lm.eos_token_ids)
  judge = judge_local.local_judge(lm, dialogue, batch_tokens=4096)

  def count_tokens(match: judge_local.Match) -> int:
    return max(
      sum(map(len, pair))
      for question in judge_questions.build_questions(match)
      for pair in judge_local.tokenize_question(lm.tokenizer, dialogue, question)
    )

  lengths = {match.prompt: count_tokens(match) for match in labelled.matches}
  matches = sorted(labelled.matches, key=lambda match: lengths[match.prompt])
  short = [match for match in matches if lengths[match.prompt] <= flags.most_tokens]
  chosen = short[: flags.limit] if flags.limit >= 0 else short
  say(f'{len(matches)} pairs, {len(chosen)} of them read; rows left out: {labelled.left_out}')
  comparisons, begin = [], time.perf_counter()
  for start in range(0, len(chosen), BLOCK):
    comparisons += judge(chosen[start : start + BLOCK])
    done, seconds = chosen[: start + BLOCK], time.perf_counter() - begin
    scores = score_labelled(comparisons)
    bias = length_bias(
      length_differences([match.responses for match in done]),
      [c.mean_log_odds for c in comparisons],
    )
    results = {
      'read': len(done),
      'longest': lengths[done[-1].prompt],
      'tokens': 2 * sum(lengths[match.prompt] for match in done),
      'seconds': seconds,
      'status': judge_status(scores),
      'biases': find_biases(scores['answers'], bias),
      'length_bias': bias,
      **{name: value for name, value in scores.items() if name != 'items'},
    }
    say(str(results))
    if flags.output:
      write_json(pathlib.Path(flags.output), results | {'items': scores['items']})


if __name__ == '__main__':
  main()

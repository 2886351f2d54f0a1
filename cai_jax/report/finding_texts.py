"""The texts of findings: what is wrong, the numbers that show it, and what to do."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.report.finding_numbers import Difference, points, share
from cai_jax.report.numbers import heading

# Flags that make a text useless as an example, with what they say of "... of the revisions".
COLLAPSE_FLAGS = {
  'empty': 'are empty',
  'truncated': 'were cut off at max_tokens',
  'repetition': 'repeat themselves',
  'off_topic': 'are off topic',
  'off_topic_words': 'have no content word of the prompt',
  'low_logprob': 'are text that the model itself finds unlikely',
  'wrong_language': 'are in another language than the prompt',
  'critique_copied': 'copy their critique',
  'demonstration': 'copy a demonstration',
  'principle_leak': 'repeat what they were asked to do',
}
# Above this rate the revisions have collapsed, whatever `feedback.max_rate` allows.
COLLAPSE_LIMITS = {name: 0.5 if name == 'truncated' else 0.3 for name in COLLAPSE_FLAGS}
UNCHANGED_FLAGS = ('identical', 'near_identical')  # another check reads these
LENGTHS = ('mean_tokens', 'mean_words', 'mean_characters')  # of no value by themselves
HARM = re.compile(r'harm|violation|reward|toxic|unsafe|guard|hate', re.IGNORECASE)
HELP = re.compile(r'helpful', re.IGNORECASE)
MORE_IS_WORSE = re.compile(
  r'violation|^harmful|toxic|unsafe|off_topic|loop|repetition|truncated|empty|garbled|word_salad'
)
WORLD_NOTE = 'This run shows recovery of a grammar only'


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is wrong with a run.

  Attributes:
    severity: 'worthless', 'serious', 'caution' or 'note'.
    title: what is wrong, without a full stop.
    evidence: the numbers that show it, with their intervals, in sentences.
    advice: what to do, in sentences.
  """

  severity: str
  title: str
  evidence: str
  advice: str


def collapse(flags: Sequence[tuple[str, Mapping[str, Any], float]], severity: str) -> Finding:
  """Return that the revisions are useless texts.

  Args:
    flags: name, entry {'rate', 'interval'} and limit of each flag above its limit, worst first.
    severity: of the finding.
  """
  parts = [
    f'{share(entry["rate"], entry.get("interval"))} {COLLAPSE_FLAGS[name]} (limit {share(limit)})'
    for name, entry, limit in flags
  ]
  return Finding(
    severity,
    'The revisions have collapsed',
    f'Of the revisions {_join(parts)}.',
    'Nothing that was trained on them means anything: do not use the scores below. Sample with '
    "the model's own settings, raise max_tokens, or use a stronger model, and read some chains "
    'with these flags first.',
  )


def spoiled(flags: Sequence[tuple[str, Mapping[str, Any]]]) -> Finding:
  """Return that many revisions are useless texts, but not so many that all have collapsed.

  Args:
    flags: name and entry {'rate', 'interval'} of each flag, worst first.
  """
  parts = [
    f'{share(entry["rate"], entry.get("interval"))} {COLLAPSE_FLAGS[name]}' for name, entry in flags
  ]
  names = ', '.join(f"'{name}'" for name, _ in flags)
  return Finding(
    'serious' if flags[0][1]['rate'] >= 0.2 else 'caution',
    'Many revisions are useless texts',
    f'Of the revisions {_join(parts)}.',
    f'Read some of them. train.filters=({names},) leaves them out of training.',
  )


def over_limit(name: str, entry: Mapping[str, Any], limit: float) -> Finding:
  """Return that another flag is above its limit in `feedback.max_rate`."""
  return Finding(
    'serious',
    f'Many revisions have the flag {name}',
    f'{share(entry["rate"], entry.get("interval"))} of the revisions, limit {share(limit)}.',
    f"Leave them out with train.filters=('{name}',), or change the constitution's requests.",
  )


def idle_critiques(name: str, entry: Mapping[str, Any]) -> Finding:
  """Return that most critiques find nothing, or are none."""
  what = 'are no critiques' if name == 'not_a_critique' else 'have a stock phrase of praise'
  return Finding(
    'caution',
    f'Most critiques {what}',
    f'{share(entry["rate"], entry.get("interval"))} of them.',
    'Read some: the prompts may be harmless, or the model cannot criticize.',
  )


def idle_revisions(rate: float) -> Finding:
  """Return that the revisions equal the responses before them."""
  return Finding(
    'serious',
    'The revisions change almost nothing',
    f'{share(min(rate, 1.0))} of the first revisions equal the response before, or nearly so.',
    'Read some critiques: if they find nothing wrong, the prompts are harmless or the model cannot '
    'criticize. Training on such rows teaches the model its own answers.',
  )


def no_effect_of_revisions(last: int, found: Mapping[str, Difference]) -> Finding:
  """Return that no score differs between the initial response and the last round."""
  return Finding(
    'serious',
    'The revisions change no score',
    f'Revision {last} minus the initial response: {_list_differences(found)}. Every interval '
    'includes 0.',
    'Use more held-out prompts, or a model that can revise. D_CAI is then no better than the '
    "model's own answers.",
  )


def no_measure_of_harm(columns: Sequence[str], has_judge: bool) -> Finding:
  """Return that nothing in the run measures harm.

  Args:
    columns: what the run measured instead.
    has_judge: whether there is a judge, which is not valid.
  """
  judge = ', and the judge is not valid' if has_judge else ''
  measured = _join([heading(name) for name in columns]) or 'nothing'
  return Finding(
    'serious',
    'Nothing here measures harm',
    f'The run measured {measured}{judge}. None of that says whether an answer is harmful.',
    'Name a judge with labelled pairs (evaluation.judge), a reward model (evaluation.reward_model) '
    'or a scorer (evaluation.scorer), or rate answers by hand.',
  )


def bad_judge(status: str, reasons: Sequence[str]) -> Finding:
  """Return that the judge is unvalidated or cannot tell."""
  title = 'The judge cannot tell' if status == 'cannot tell' else f'The judge is {status}'
  return Finding(
    'serious',
    title,
    f'{_sentence("; ".join(reasons))} Its verdicts get no win rate.'.strip(),
    'Do not sort or count by its verdicts. Give labelled pairs for it, or a stronger judge.',
  )


def inattentive_judge(check: str, result: Mapping[str, Any]) -> Finding:
  """Return that the judge does not notice what a response is about, or that it was cut."""
  other = {'other prompt': 'the answer to another prompt', 'truncated': 'half of the answer'}
  return Finding(
    'serious',
    'The judge does not read the responses',
    f'Against {other.get(check, check)} it prefers the right answer in '
    f'{share(result["accuracy"], result["accuracy_interval"])} of {result["count"]} pairs, no '
    'more often than chance.',
    'Use another judge. A judge that misses this cannot see harm.',
  )


def biased_judge(bias: str) -> Finding:
  """Return a bias of the judge in its own words."""
  return Finding(
    'caution',
    'The judge is biased',
    _sentence(f'It {bias}'),
    'Read its win rates at equal lengths only, and over both orders.',
  )


def lost_comparison(criterion: str, wins: Mapping[str, Any]) -> Finding:
  """Return that a valid judge prefers M_θ."""
  return Finding(
    'serious',
    f'The judge prefers M_θ: {criterion}',
    f'M_aligned wins {share(wins["rate"], wins["interval"])} of the comparisons.',
    'Sort the held-out answers by this verdict and read those that M_aligned loses.',
  )


def no_effect_of_training(found: Mapping[str, Difference]) -> Finding:
  """Return that M_aligned does not differ from M_θ."""
  return Finding(
    'serious',
    'M_aligned does not differ from M_θ',
    f'M_aligned minus M_θ: {_list_differences(found)}. Every interval includes 0.',
    'Train longer or with a higher learning rate, generate more rows, or evaluate more prompts.',
  )


def only_lengths_differ(found: Mapping[str, Difference], scores: Mapping[str, Any]) -> Finding:
  """Return that M_aligned differs from M_θ in length only."""
  lengths = {key: found[key] for key in found if key not in scores}
  return Finding(
    'serious',
    'M_aligned differs from M_θ in length only',
    f'M_aligned minus M_θ: {_list_differences(lengths)}; {_list_differences(scores)}.',
    'Shorter or longer answers are no progress by themselves. Evaluate more prompts.',
  )


def worse_model(worse: Mapping[str, Difference]) -> Finding:
  """Return that M_aligned is worse than M_θ by some rates."""
  return Finding(
    'serious',
    'M_aligned is worse than M_θ',
    f'M_aligned minus M_θ: {_list_differences(worse)}.',
    'Read the held-out answers with these flags, and the revisions that it was trained on.',
  )


def refuses_everything(rate: float, bounds: Sequence[float]) -> Finding:
  """Return that M_aligned refuses most benign prompts."""
  return Finding(
    'worthless',
    'M_aligned refuses benign prompts',
    f'It refuses {share(rate, bounds)} of the held-out benign prompts.',
    'A model that refuses everything breaks no rule and is of no use. Raise '
    'train.helpfulness_share, and add principles against needless refusals.',
  )


def refuses_more(rise: Difference) -> Finding:
  """Return that M_aligned refuses more benign prompts than M_θ."""
  return Finding(
    'serious',
    'M_aligned refuses more benign prompts than M_θ',
    f'The rate of refusals rises by {points("_rate", rise)}.',
    'Raise train.helpfulness_share.',
  )


def refuses_all_harmful(rate: float, bounds: Sequence[float]) -> Finding:
  """Return that M_aligned refuses nearly all harmful prompts."""
  return Finding(
    'caution',
    'M_aligned refuses nearly every harmful prompt',
    f'It refuses {share(rate, bounds)} of them.',
    'Compare with its refusals of benign prompts: it may refuse whatever it is asked.',
  )


def helps_less(name: str, key: str, drop: Difference, prompts: str, severity: str) -> Finding:
  """Return that M_aligned helps less than M_θ.

  Args:
    name: the score's name for readers.
    key: its key.
    drop: M_aligned minus M_θ.
    prompts: 'benign' or 'harmful'.
    severity: of the finding.
  """
  return Finding(
    severity,
    f'M_aligned helps less on {prompts} prompts',
    f'M_aligned minus M_θ: {name} {points(key, drop)}.',
    'Raise train.helpfulness_share, and read the held-out answers with the lowest score.',
  )


def loss_not_finite(count: int, total: int) -> Finding:
  """Return that losses of training steps are NaN or infinite."""
  return Finding(
    'worthless',
    'The training loss is not finite',
    f'{count} of {total} recorded losses are NaN or infinite.',
    'Lower train.learning_rate, or train in float32.',
  )


def loss_did_not_fall(first: float, last: float, steps: int) -> Finding:
  """Return that the loss at the end is not below that at the start."""
  values = 'value' if steps == 1 else f'{steps} values'
  return Finding(
    'serious',
    'The training loss did not fall',
    f'The mean of the first {values} is {first:.4g}, that of the last {last:.4g}.',
    'Change train.learning_rate or train.epochs, and check that examples are left after filters.',
  )


def clipped(rate: float) -> Finding:
  """Return that most gradients were clipped."""
  return Finding(
    'caution',
    'Most gradients were clipped',
    f'In {share(rate)} of the steps, so train.clip_norm sets the size of most updates.',
    'Raise train.clip_norm, set it to 0, or lower train.learning_rate.',
  )


def overfitted(best: Mapping[str, Any], last: Mapping[str, Any], severity: str) -> Finding:
  """Return that the held-out loss rises.

  Args:
    best: the row with the least loss.
    last: the last row.
    severity: of the finding.
  """
  return Finding(
    severity,
    'The model overfits: the held-out loss rises',
    f'It is {last["loss"]:.4g} at step {last["step"]}, after {best["loss"]:.4g} at step '
    f'{best["step"]}.',
    'Train for fewer epochs, or set train.patience, which keeps the best step.',
  )


def few_prompts(count: int, smallest: float | None, severity: str) -> Finding:
  """Return that only large differences can be seen.

  Args:
    count: number of held-out harmful prompts.
    smallest: smallest drop from 50 % that can be shown; None if not even a drop to 0 can.
    severity: of the finding.
  """
  if smallest is None:
    evidence = f'With {count} prompts, not even a drop from 50 % to 0 is seen in 4 of 5 runs.'
  else:
    evidence = (
      f'With {count} prompts, the smallest drop from 50 % that is seen in 4 of 5 runs is about '
      f'{100 * smallest:.0f} points (answers paired by prompt, with a correlation of 0.5).'
    )
  return Finding(
    severity,
    'Too few held-out prompts',
    evidence,
    'Read differences below that as unknown, not as none. Evaluate more prompts.',
  )


def ended_chains(name: str, ended: int, total: int, severity: str) -> Finding:
  """Return that chains ended without a row."""
  return Finding(
    severity,
    f'Chains of {name} ended without a row',
    f'{ended} of {total}.',
    'The rows that are left may be an easier selection. ended-*.jsonl has the reasons.',
  )


def embedded_world() -> Finding:
  """Return that the run is in the embedded world."""
  return Finding(
    'note',
    WORLD_NOTE,
    'Its model, prompts and oracle come from one artificial grammar, which fixes what critiques '
    'and revisions can reach.',
    'It checks that the pipeline loses nothing. It is no evidence about the method on real text.',
  )


def remark(stage: str, text: str) -> Finding:
  """Return a remark of a stage about itself."""
  severity = 'caution' if text.startswith('Warning:') else 'note'
  evidence = text.removeprefix('Warning:').strip()
  return Finding(severity, f'Remark of the stage {stage}', evidence, '')


def _list_differences(found: Mapping[str, Difference]) -> str:
  shown = [f'{heading(key)} {points(key, value)}' for key, value in list(found.items())[:5]]
  more = len(found) - len(shown)
  return ', '.join(shown) + (f' and {more} more' if more else '')


def _join(parts: Sequence[str]) -> str:
  """Return 'a, b and c'."""
  return ' and '.join(filter(None, [', '.join(parts[:-1]), *parts[-1:]]))


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:] + ('' if text.endswith('.') else '.') if text else ''

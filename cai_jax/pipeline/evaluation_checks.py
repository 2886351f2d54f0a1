"""Checks of an evaluation before the first stage of a run: its models, labels and lengths."""

from collections.abc import Mapping, Sequence

from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.encode import Piece
from cai_jax.evaluation import judge_labels, questions
from cai_jax.evaluation.baselines import BY_JUDGE
from cai_jax.evaluation.config import LESS_HARMFUL, TRAINED, EvaluationConfig
from cai_jax.evaluation.registries import RESPONSE_MEASURES
from cai_jax.model.classifier import inspect_classifier
from cai_jax.model.lm import ModelInfo
from cai_jax.pipeline import baselines, prompt_sets
from cai_jax.pipeline.chains import prepare_job
from cai_jax.pipeline.lengths import check_lengths
from cai_jax.pipeline.models import model_loader, open_models
from cai_jax.pipeline.run import Run
from cai_jax.runtime.errors import UserError
from cai_jax.scoring import judge, judge_local, judge_questions, likelihood, refusal
from cai_jax.scoring.answer_form import check_form, count_tokens
from cai_jax.scoring.guards.guard import GUARDS, Reader
from cai_jax.scoring.loader import Inspected
from cai_jax.scoring.reward import find_label, make_dialogue
from cai_jax.scoring.rubrics.rubric import RUBRICS, Asker, build_question


def check_evaluation(run: Run, infos: Mapping[str, ModelInfo]) -> None:
  """Check the models and files that the evaluate stage uses, without loading weights.

  Args:
    run: the run.
    infos: the language models of the run, by name.

  Raises:
    UserError: if anything is wrong; the message names the config field.
  """
  config = run.config.evaluation
  if config.reward_model and config.reward_model != TRAINED:  # see preference_checks
    _check_classifier(run, 'reward_model', 'reward_label')
  if config.refusal not in refusal.CLASSIFIERS:
    _check_classifier(run, 'refusal', 'refusal_label')
  for name, load in RESPONSE_MEASURES.items():
    try:
      load(config, model_loader(run, inspect_only=True))
    except Inspected:
      pass
    except UserError as error:
      raise UserError(f'evaluation, measure {name!r}: {error}') from error
  if config.judge and config.judge not in judge.JUDGES:
    name = run.config.model.base if config.judge == 'base' else config.judge
    _check_judge(run, name, infos[name])
    for rubric in config.rubrics:
      _check_rubric(run, rubric, name, infos[name])
  for kind, name in config.guard_checkpoints.items():
    _check_guard(run, kind, name, infos[name])
  _check_baselines(run, infos)
  for name in {run.config.model.aligned or run.training_start, run.config.model.base} - {''}:
    _check_questions(run, name, infos[name])


def _check_baselines(run: Run, infos: Mapping[str, ModelInfo]) -> None:
  """Check that M_θ can read the prompts of the baselines, and that those that choose have a judge.

  A chat template without a system message makes 'constitution_prompt' impossible.
  """
  config, model = run.config.evaluation, run.config.model
  if config.selections:
    where = f'evaluation.baselines: {config.selections[0]!r}'
    if not run.config.sampling.initial.temperature:
      raise UserError(
        f'{where} chooses among several answers, which are all the same at '
        'sampling.initial.temperature=0. Raise the temperature, or leave the baseline out.'
      )
  by_judge = config.selections_by(BY_JUDGE)
  if by_judge:
    where = f'evaluation.baselines: {by_judge[0]!r}'
    if not config.judge_name and not model.base:
      raise UserError(
        f'{where} needs a judge, and a server holds M_θ. Name a checkpoint as evaluation.judge.'
      )
    if not config.judge_name:
      _check_judge(run, model.base, infos[model.base])
  if not config.baselines:
    return
  held_out = [prompt for name in prompt_sets.HELD_OUT for prompt in run.prompts[name]]
  with open_models(run, weights=False) as sampled:
    for name in config.baselines:
      try:
        prepare_job(run, sampled, [], baselines.make_prompts(run, name, held_out))
      except UserError as error:
        raise UserError(f'evaluation.baselines: {name!r}: {error}') from error


def _check_classifier(run: Run, field: str, label_field: str) -> None:
  """Check a sequence classifier: its files, its label, its template, and its context."""
  config = run.config.evaluation
  name = getattr(config, field)
  try:
    info = inspect_classifier(name)
  except UserError as error:
    raise UserError(f'evaluation.{field}: {error}') from error
  try:
    find_label(info.labels, getattr(config, label_field) or None, name)
  except UserError as error:
    raise UserError(f'evaluation.{label_field}: {error}') from error
  try:
    dialogue = make_dialogue(info, config.style, run.config.feedback.template_options)
    check_lengths(
      run,
      info.config.max_positions,
      1,
      lambda messages: len(dialogue.conversation([*messages, _reply('x')])) - 1,
    )
    if field == 'reward_model':
      check_rewarded_pairs(run, dialogue, info.config.max_positions)
  except UserError as error:
    raise UserError(f'evaluation.{field}={name!r}: {error}') from error


def check_rewarded_pairs(run: Run, dialogue: Dialogue, context: int) -> None:
  """Check that a reward model can read the labelled pairs on which its accuracy is measured.

  Args:
    run: the run.
    dialogue: renders conversations for the reward model.
    context: tokens that the reward model reads at most.

  Raises:
    UserError: if a pair cannot be read, or is too long.
  """
  config = run.config.evaluation
  if not config.reward_labelled:
    return
  limit = config.judge_labelled_limit
  for match in judge_labels.read_labelled(config.reward_labelled, LESS_HARMFUL, limit).matches:
    for text in match.responses:
      tokens = len(dialogue.conversation([*match.messages, _reply(text)]))
      if tokens > context:
        raise UserError(
          f'A response to {match.prompt} has {tokens} tokens with its prompt, but the context '
          f'holds {context}. Leave the pair out of evaluation.reward_labelled, or use a model with '
          'a longer context.'
        )


def _check_judge(run: Run, name: str, info: ModelInfo) -> None:
  """Check that the judge's context holds each question: of the run, and of the labelled pairs."""
  config, context = run.config.evaluation, info.config.max_positions
  longest = max((*config.judge_principles, *config.judge_helpful_principles), key=len)
  try:
    dialogue = judge_local.judge_dialogue(
      info.tokenizer, (), run.config.feedback.template_options, config.style
    )

    def count(question: str) -> int:
      pairs = judge_local.tokenize_question(info.tokenizer, dialogue, question)
      return max(sum(map(len, pair)) for pair in pairs) + config.judge_reasoning

    check_lengths(
      run,
      context,
      2,
      lambda messages: count(judge_questions.build_question(messages, longest, 'x', 'x')),
      ('initial', 'revision'),
    )
    for match in labelled_pairs(config):
      if (tokens := max(map(count, judge_questions.build_questions(match)))) > context:
        raise UserError(
          f'The question about {match.prompt} has {tokens} tokens, but its context holds '
          f'{context}. Leave the pair out of evaluation.judge_labelled, or use a model with a '
          'longer context.'
        )
  except UserError as error:
    raise UserError(f'evaluation.judge={name!r}: {error}') from error


def _check_guard(run: Run, kind: str, name: str, info: ModelInfo) -> None:
  """Check a guard's chat template, the tokens of its labels, and its context."""
  try:
    reader = Reader(GUARDS[kind], info.tokenizer)
    reader.check()
    check_lengths(
      run,
      info.config.max_positions,
      1,
      lambda messages: reader.count_tokens(messages, 'x'),
      ('initial', 'revision'),
    )
  except UserError as error:
    raise UserError(f'evaluation.guard_models={name!r} as {kind!r}: {error}') from error


def _check_rubric(run: Run, rubric: str, name: str, info: ModelInfo) -> None:
  """Check that a judge's tokenizer has a rubric's labels, and that its context holds questions."""
  try:
    options, style = run.config.feedback.template_options, run.config.evaluation.style
    asker, entry = Asker(info.tokenizer, options, style), RUBRICS[rubric]

    def prompt(messages: Sequence[dict[str, str]]) -> list[Piece]:
      return asker.prompt(build_question(entry, messages, 'x'))

    check_form(asker.encoder, prompt([{'role': 'user', 'content': 'A question.'}]), entry.form)
    check_lengths(
      run,
      info.config.max_positions,
      1,
      lambda messages: count_tokens(asker.encoder, prompt(messages), entry.form),
      ('initial', 'revision'),
    )
  except UserError as error:
    raise UserError(f'evaluation.judge={name!r}, rubric {rubric!r}: {error}') from error


def labelled_pairs(config: EvaluationConfig) -> Sequence[judge.Match]:
  """Return the labelled pairs that the judge reads; none if the config names none."""
  if not config.judge_labelled:
    return []
  principle, limit = config.judge_principles[0], config.judge_labelled_limit
  return judge_labels.read_labelled(config.judge_labelled, principle, limit).matches


def _check_questions(run: Run, name: str, info: ModelInfo) -> None:
  """Check that a model can read every multiple-choice question."""
  for path in run.config.evaluation.multiple_choice:
    for question in questions.read_questions(path):
      for option in question.options:
        label = f'evaluation.multiple_choice: {path}:{question.line}'
        try:
          pair = likelihood.tokenize_pair(info.tokenizer, question.prompt, option)
        except UserError as error:
          raise UserError(f'{label}: {error}') from error
        tokens = sum(map(len, pair))
        if tokens > info.config.max_positions:
          raise UserError(
            f'{label} has {tokens} tokens, but the context of {name} holds '
            f'{info.config.max_positions}. Leave the question out.'
          )


def _reply(text: str) -> dict[str, str]:
  return {'role': 'assistant', 'content': text}

"""`--preview`: the contexts of a run as the models will see them, before anything is sampled."""

import re
import shutil
import subprocess
import sys

import pytest

from cai_jax import pipeline
from cai_jax.feedback.preview import preview_chain
from cai_jax.pipeline.models import open_models
from cai_jax.pipeline.preview import preview_run
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion
from tests.pipeline_setup import ROOT, small

REPLIES = {
  'initial': 'Say no.',
  'critique_1': 'It is rude.',
  'revision_1': 'I will not.',
  'critique_2': 'It is short.',
}


@pytest.fixture
def without_weights(random_model, tmp_path):
  """The folder of a model whose weights are missing."""
  folder = tmp_path / 'model'
  shutil.copytree(random_model, folder, ignore=shutil.ignore_patterns('*.safetensors'))
  return folder


def build(model, workdir, **feedback):
  """Build a run of two rounds on a model."""
  config = small(model)
  config.feedback.update(feedback)
  return pipeline.build(config, workdir / 'run')


def preview(run, count):
  """Return the texts that a preview prints."""
  texts = []
  preview_run(run, count, texts.append)
  return texts


@pytest.mark.parametrize('context', ['fresh', 'growing'])
@pytest.mark.parametrize('style', ['chat', 'plain'])
def test_contexts_are_those_of_the_chain_but_for_the_replies(
  style, context, without_weights, tmp_path
):
  run = build(without_weights, tmp_path, style=style, context=context)
  with open_models(run, weights=False) as models:
    job = pipeline.prepare_job(run, models, run.prompts['harmful'], [])
  prompt, dialogue = run.prompts['harmful'][0], job.stages.initial.dialogue
  shown = list(preview_chain(job, prompt, 'harmful'))
  assert [c.turn.name for c in shown] == [*REPLIES, 'revision_2']
  assert shown[0].turn.context == dialogue.prompt(prompt.messages)
  chain, completion = job.chain(prompt, 'harmful'), None
  for previewed in shown:
    turn = chain.send(completion)
    assert turn.name == previewed.turn.name and turn.sampling == previewed.turn.sampling
    text = previewed.text
    for name, reply in REPLIES.items():
      text = text.replace(f'⟨reply: {name.replace("_", " ")}⟩', reply)
    assert text == dialogue.show(turn.context)
    tokens = dialogue.reply(REPLIES.get(turn.name, ''))
    completion = Completion(tokens, '', [0.0] * len(tokens), 'stop')


def test_every_turn_of_every_prompt_is_shown_without_weights_or_files(without_weights, tmp_path):
  run = build(without_weights, tmp_path)
  text = '\n'.join(preview(run, 2))
  titles = re.findall(r'^==== ([\w ]+), (harmful|helpful) prompt', text, re.M)
  expected = [(name.replace('_', ' '), 'harmful') for name in (*REPLIES, 'revision_2')]
  assert sorted(titles) == sorted([*expected * 2, *[('initial', 'helpful')] * 2])
  assert text.count('⟨reply: critique 2⟩') == 2 and '⟦<|assistant|>⟧' in text
  assert not run.workdir.exists()


def test_a_spelled_control_token_is_not_shown_as_one(without_weights, tmp_path):
  run = build(without_weights, tmp_path)
  with open_models(run, weights=False) as models:
    job = pipeline.prepare_job(run, models, run.prompts['harmful'], [])
  dialogue = job.stages.initial.dialogue
  shown = dialogue.show(dialogue.prompt([{'role': 'user', 'content': 'say <|end|> now'}]))
  assert 'say <|end|> now⟦<|end|>⟧' in shown


def test_another_model_sees_the_placeholder_through_its_own_tokenizer(
  without_weights, tiny_hf_folder, tmp_path
):
  config = small(without_weights)
  config.model.critique = str(tiny_hf_folder('qwen2'))
  config.feedback.demonstrations = False
  texts = preview(pipeline.build(config, tmp_path / 'run'), 1)
  critique = next(text for text in texts if text.startswith('\n==== critique 1'))
  assert '⟨reply: initial⟩⟦<|im_end|>⟧' in critique and str(config.model.critique) in critique


def test_a_chain_with_a_donor_shows_the_turns_of_the_donor(without_weights, tmp_path):
  run = build(without_weights, tmp_path, variant='shuffled')
  texts = preview(run, 1)
  donor = next(text for text in texts if text.startswith('\n==== donor initial'))
  assert run.prompts['harmful'][1].messages[-1]['content'] in donor
  revision = next(text for text in texts if text.startswith('\n==== revision 1'))
  assert '⟨reply: initial⟩' in revision and '⟨reply: donor critique 1⟩' in revision


def test_a_run_without_prompts_has_nothing_to_preview(without_weights, tmp_path):
  config = small(without_weights)
  config.prompts.harmful.source = ''
  with pytest.raises(UserError, match='prompts.harmful.source is empty'):
    preview(pipeline.build(config, tmp_path / 'run'), 1)


def test_the_command_line_prints_the_preview_and_ends(tmp_path):
  command = [sys.executable, 'launch.py', '--config=configs/tiny.py', '--preview=1']
  command += [f'--workdir={tmp_path / "run"}', '--config.feedback.rounds=1']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Nothing has been sampled.')
  assert done.stdout.count('\n==== ') == 4 and not (tmp_path / 'run').exists()

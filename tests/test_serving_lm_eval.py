"""lm-eval against our server: its log-likelihoods are those that we compute.

CAI_JAX_LM_EVAL names the Python of an environment with `lm-eval[api]`, and CAI_JAX_LM_EVAL_MODEL
the folder of a model. The default is the embedded one.
"""

import json
import os
import subprocess
import threading

import pytest

import cai_jax
from cai_jax.runtime import interruption
from cai_jax.runtime.interruption import Interrupted
from cai_jax.scoring import likelihood
from cai_jax.serving.command import ServingConfig, serve
from cai_jax.tiny.files import model_path

PYTHON = os.environ.get('CAI_JAX_LM_EVAL')
MODEL = os.environ.get('CAI_JAX_LM_EVAL_MODEL', 'tiny')

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not PYTHON, reason='set CAI_JAX_LM_EVAL to a Python with lm-eval[api]'),
]

CHOICES = [
  {'question': 'The capital of France is', 'choices': [' Paris', ' a bicycle', ' Berlin']},
  {'question': 'Water is made of hydrogen and', 'choices': [' helium', ' oxygen']},
  {'question': 'To repair a bicycle, first look at the', 'choices': [' brake', ' moon and stars']},
]
TEXTS = [
  {'text': 'The assistant answers the question of the human in a few plain words.'},
  {'text': 'Héllo wörld — 12 brakes; 3 cables.'},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
target_delimiter: ""
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
"""
TEXT = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


def write_tasks(folder):
  """Write both tasks and their data."""
  for name, rows, task in (('choice', CHOICES, CHOICE), ('text', TEXTS, TEXT)):
    data = folder / f'{name}.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    (folder / f'{name}.yaml').write_text(TASK.format(name=f'cai_{name}', file=data) + task)


def evaluate(folder, url):
  """Run lm-eval on both tasks, and return its samples by task."""
  arguments = f'model=served,base_url={url}/completions,max_length=512,num_concurrent=4'
  command = [PYTHON, '-m', 'lm_eval', '--model', 'local-completions', '--model_args', arguments]
  command += ['--tasks', 'cai_choice,cai_text', '--include_path', str(folder), '--log_samples']
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'XLA'))}
  environment |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(folder / 'cache')}
  subprocess.run(
    [*command, '--output_path', str(folder / 'out')], env=environment, check=True, cwd=folder
  )
  files = {name: next(folder.glob(f'out/*/samples_cai_{name}_*')) for name in ('choice', 'text')}
  return {
    name: [json.loads(line) for line in path.read_text().splitlines()]
    for name, path in files.items()
  }


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
  """What lm-eval wrote about each question and text."""
  folder = tmp_path_factory.mktemp('lm-eval')
  write_tasks(folder)
  results = {}

  def client(server):
    def work():
      try:
        results.update(evaluate(folder, server.url))
      finally:
        os.kill(os.getpid(), 15)

    threading.Thread(target=work, daemon=True).start()

  with pytest.raises(Interrupted), interruption.listen():
    serve(ServingConfig(MODEL, 'served', port=0, length=512), client)
  return results


def test_log_likelihoods_of_options_are_ours(samples):
  lm = cai_jax.load(model_path(MODEL))
  assert len(samples['choice']) == len(CHOICES)
  for sample in samples['choice']:
    question, options = sample['doc']['question'], sample['doc']['choices']
    pairs = [likelihood.tokenize_pair(lm.tokenizer, question, option) for option in options]
    expected = likelihood.log_likelihoods(lm, *zip(*pairs, strict=True))
    given = [float(response[0][0]) for response in sample['resps']]
    print(question, [a - b for a, b in zip(given, expected, strict=True)])
    assert given == pytest.approx(expected, abs=1e-4)


def test_log_likelihoods_of_texts_are_ours(samples):
  lm = cai_jax.load(model_path(MODEL))
  start = lm.tokenizer.bos_token_id or lm.tokenizer.eos_token_id  # lm-eval's rule
  assert len(samples['text']) == len(TEXTS)
  for sample in samples['text']:
    tokens = lm.tokenizer.encode(sample['doc']['text'], add_special_tokens=False)
    (expected,) = likelihood.log_likelihoods(lm, [[start]], [tokens])
    print(sample['doc']['text'], float(sample['resps'][0][0]) - expected)
    assert float(sample['resps'][0][0]) == pytest.approx(expected, abs=1e-4)

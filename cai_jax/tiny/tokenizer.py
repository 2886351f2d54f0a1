"""The embedded model's tokenizer: byte-level BPE with single digits, trained on the world's text.

Byte level means that any text can be written; the control tokens stand only between messages.
`cai_jax.tiny.pretrain` writes it into the model folder.
"""

import pathlib

import tokenizers
from transformers import PreTrainedTokenizerFast

from cai_jax.tiny import corpus

FOLDER = pathlib.Path(__file__).with_name('model')
VOCAB_SIZE = 1024
CONTEXT = 1024
PAD, BOS, USER, ASSISTANT, END = '<|pad|>', '<|bos|>', '<|user|>', '<|assistant|>', '<|end|>'

# Every border between template and text is a control token. A system message, which the model has
# never seen, stands right after the first one.
CHAT_TEMPLATE = (
  "{{- '<|bos|>' }}"
  '{%- for message in messages %}'
  "{%- if message['role'] == 'system' and loop.first %}"
  "{{- message['content'] + '<|end|>' }}"
  "{%- elif message['role'] in ('user', 'assistant') %}"
  "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
  '{%- else %}'
  "{{- raise_exception('unknown role ' + message['role'] + ', or a system message not first') }}"
  '{%- endif %}'
  '{%- endfor %}'
  "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def train(seed: int = 0, documents: int = 20_000) -> PreTrainedTokenizerFast:
  """The tokenizer trained on the first documents of a corpus; ids 0..4 are the controls."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  bpe.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCAB_SIZE,
    special_tokens=[PAD, BOS, USER, ASSISTANT, END],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  texts = (
    message['content'] for document in corpus.documents(documents, seed) for message in document
  )
  bpe.train_from_iterator(texts, trainer)
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    pad_token=PAD,
    bos_token=BOS,
    eos_token=END,
    extra_special_tokens=[USER, ASSISTANT],
    chat_template=CHAT_TEMPLATE,
    model_max_length=CONTEXT,
    clean_up_tokenization_spaces=False,
  )

"""The tokenizer of the embedded model: byte-level BPE, trained on the text of the world.

It can encode any text, because it works on bytes. Each digit is one token, and control tokens occur
only between messages. `cai_jax.tiny.pretrain` writes it into the folder of the model.
"""

import tokenizers
from transformers import PreTrainedTokenizerFast

from cai_jax.tiny import corpus

VOCAB_SIZE = 1024
MAX_POSITIONS = 1024  # context of the embedded models in tokens
PAD, BOS, USER, ASSISTANT, END = '<|pad|>', '<|bos|>', '<|user|>', '<|assistant|>', '<|end|>'

# A control token separates the template from each text. A system message, which the model has never
# seen, follows the first control token.
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


def train_tokenizer(seed: int = 0, num_documents: int = 20_000) -> PreTrainedTokenizerFast:
  """Return a tokenizer trained on the first documents of a corpus.

  Its ids 0..4 are the control tokens, in the order PAD, BOS, USER, ASSISTANT, END.

  Args:
    seed: the seed of the corpus.
    num_documents: the number of documents.
  """
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
  documents = corpus.make_documents(num_documents, seed)
  texts = (message['content'] for document in documents for message in document)
  bpe.train_from_iterator(texts, trainer)
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    pad_token=PAD,
    bos_token=BOS,
    eos_token=END,
    extra_special_tokens=[USER, ASSISTANT],
    chat_template=CHAT_TEMPLATE,
    model_max_length=MAX_POSITIONS,
    clean_up_tokenization_spaces=False,
  )

"""Models behind an OpenAI-compatible completions API, such as vLLM, SGLang, TGI or llama.cpp.

- `config`: the address of a served model, and settings of requests.
- `protocol`: request bodies and answers, and how the servers differ. To support another server,
  register it there.
- `connection`: HTTP, retries and worker threads.
- `tokens`: the sampled tokens and log-probabilities, reconstructed from an answer.
- `model`: `Remote`, which the engine uses like a model in memory.
"""

from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.model import Remote

__all__ = ['Remote', 'RemoteConfig']

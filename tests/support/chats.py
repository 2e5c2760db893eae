"""Chat templates in the manner of published ones, and a small tokenizer that has their tokens."""

from __future__ import annotations

import functools

from tokenizers import AddedToken

from megatron_r1.config.data import DataConfig
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer

QWEN = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if message['role'] != 'system' %}\n"
    "        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN_MARKED = QWEN.replace(
    "        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n",
    "        {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "        {%- if message['role'] == 'assistant' %}\n"
    "            {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}\n"
    "        {%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}\n"
    "        {{- '\\n' }}\n",
)
REASONING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if '</think>' in message['content'] %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|assistant|>' + message['content'] + eos_token }}{% endif %}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
"""As DeepSeek-R1's: no response keeps its reasoning, and the prompt ends inside the tag that opens it."""

SINGLE = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5, I think."}]
SEVERAL = [
    {"role": "system", "content": "Be brief."},
    *SINGLE,
    {"role": "user", "content": "And 问 4 * 5?"},
    {"role": "assistant", "content": "  20\n\nfor sure "},
]
REASONED = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "<think>\n2 + 3 = 5</think>\n\n5"},
    {"role": "user", "content": "Twice?"},
    {"role": "assistant", "content": "<think>\n5 * 2 = 10</think>\n\n10"},
]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """The arithmetic world's, with the tokens that Qwen's template names."""
    tokenizer = train_tokenizer(DataConfig(num_documents=200))
    tokenizer.backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(tokenizer.backend, tokenizer.settings)

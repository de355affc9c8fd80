"""Small tokenizers made on the spot, one for each way real ones behave, and templates as awkward as real ones."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sftmix.text import ChatTemplate
from sftmix.text.encoder import Encoder
from sftmix.types import Message
from sftmix.words.fields import SpecialTokens, Thoughts

TEXT = [
    "Name a colour. Blue is a colour, and so is green.",
    "Describe how to bake bread: mix flour, water, salt and yeast; wait; bake.",
    "What is the capital of France?\nParis is the capital of France.",
    "### Instruction:\nList three fruits.\n\n### Response:\n1. Apple\n2. Pear\n3. Plum",
    "One.\n\n\nTwo.\n\n\nThree.\n\n\nFour.",
] * 4

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def chatml_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerBase:
    """Byte-level BPE, ChatML, no BOS; the end of a turn is not eos (as in Llama 3)."""
    backend = byte_level(["<|end|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=chat_template)


def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE that writes a BOS, without a chat template (a base model); pad is eos."""
    backend = byte_level(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """SentencePiece-like: spaces are part of the pieces, and the beginning of a text gets one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]  # the byte pieces are not special
    backend = Tokenizer.from_str(json.dumps(plain))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prompt_ids(encoder: Encoder, messages: Sequence[Message]) -> list[int]:
    """Token ids that transformers starts generation from, with the template that is exported."""
    chat = [{"role": message.role, "content": message.content} for message in messages]
    return encoder.tokenizer.apply_chat_template(
        chat, chat_template=encoder.chat_template, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    special_tokens: SpecialTokens = "text",
    *,
    thoughts: Thoughts = "train",
    thinks: bool | None = False,
    variables: Mapping[str, Any] | None = None,
) -> Encoder:
    """The encoder of a chat template; see `ChatTemplate` for the options."""
    renderer = ChatTemplate(
        template=template, template_options=variables, special_tokens=special_tokens, thoughts=thoughts
    )
    renderer.begin(tokenizer, thinks=thinks)
    return Encoder(tokenizer, renderer)


SMALL = {"chatml": chatml_tokenizer, "bos": bos_tokenizer, "metaspace": metaspace_tokenizer}
REAL = {
    "mistral": "tokenizers/mistral-7b-v0.3",
    "qwen2": "tokenizers/qwen2",
    "gpt2": "tokenizers/gpt2_phi",
    "base-7m": "models/base-7m",
    "stories260K": "models/stories260K",
}

THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
"""As Qwen3: an empty thinking block before the last response only."""

QWEN3 = """{%- set ns = namespace(asked=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.asked and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""Qwen3's own, without its tools: the thinking of the last response stands in a block, empty where there is none."""

QWEN3_THINKING = (
    QWEN3[: QWEN3.index("{%- if add_generation_prompt")]
    + """
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""
)
"""As Qwen3-Thinking-2507: the generation prompt begins the block."""

NO_END = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As GLM: what ends a turn is the beginning of the next one."""

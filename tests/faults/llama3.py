"""Llama 3's tokenizer from its tiktoken file, by transformers' own converter: byte-level BPE, whole words first."""

import base64
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


class Converter(TikTokenConverter):
    """It reads the file without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url):
        lines = map(str.split, Path(tiktoken_url).read_text().splitlines())
        return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def llama3_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    backend = Converter(vocab_file=path, extra_special_tokens=SPECIAL).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token="<|eot_id|>", chat_template=TEMPLATE
    )

"""Llama 3's tokenizer from its tiktoken file, as transformers makes it: byte-level BPE that takes whole words first."""

import base64
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = """{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def llama3_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the ranks of `path`; a merge is any pair of tokens that is a token itself, the pairs of the lowest first."""
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, path.read_text().splitlines())}
    letters = _letters()
    written = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece in ranks:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = sorted(
            (pair for pair in pairs if pair[0] in ranks and pair[1] in ranks), key=lambda p: (ranks[p[0]], ranks[p[1]])
        )
        merges += [(written[left], written[right]) for left, right in known]
    backend = Tokenizer(models.BPE({written[piece]: rank for piece, rank in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORDS), "isolated", False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token="<|eot_id|>", chat_template=TEMPLATE
    )


def _letters() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte: printable ones stay, the others follow from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}

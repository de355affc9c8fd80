"""Make a tokenizer and a random Llama like the study's `base-7m`, to be pretrained on the text that it is made from.

    python benchmarks/evidence/base_model.py --text TEXT --out runs/base/random

TEXT is a folder of English .txt files; base-7m read 16.4 million tokens of novels out of copyright, questions with
answers, and news. benchmarks/results/evidence/README.md has the command that pretrains it.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    options = parser.parse_args()
    make_base(options.text, options.out)


def make_base(text: Path, out: Path) -> None:
    """Write a tokenizer of 4,096 tokens, trained on the text, and a random model of 7 million parameters."""
    tokenizer = Tokenizer(models.BPE())
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=list(SPECIAL), initial_alphabet=letters.alphabet(), show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(text.glob("*.txt"))], trainer)
    pad, bos, eos, *_ = SPECIAL
    names = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, model_max_length=1024, **names)
    fast.save_pretrained(out)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)


if __name__ == "__main__":
    main()

"""What `preview` shows: text with its mask, tokens, dropped rows, and the rows that the selector keeps."""

from sftmix.data import load_data, make_encoder, render_preview
from sftmix.data.encoders import text_encoder
from tests.tiny import make_tiny


def test_text_mask_and_dropped_rows(write, options, small):
    encoder = make_encoder(small["chatml"])
    rows = [{"instruction": "Say \x1b[31mred.", "output": "é😀 red"}, {"instruction": "a", "output": ""}]
    data = load_data(options(write("rows.jsonl", rows)), encoder, max_length=64, seed=0, progress=False)
    plain = render_preview(data, encoder, [0], color=False)
    assert "<|im_start|>user\nSay \\x1b[31mred.<|im_end|>\n<|im_start|>assistant\n[[é😀 red<|im_end|>]]" in plain
    assert "1 empty response dropped: " in plain
    assert "\x1b" not in plain
    colored = render_preview(data, encoder, [0])
    assert "\x1b[0;32mé😀 red<|im_end|>\x1b[0m" in colored
    lines = plain.split("token\n")[1].split("\n\n")[0].splitlines()
    listed = [line.split() for line in lines if "..." not in line]
    encoded = data.train[0]
    for place, token, label, *_ in listed:
        assert encoded.input_ids[int(place)] == int(token)
        assert int(label) == (int(token) if encoded.target[int(place)] else -100)


def test_documents_and_their_mask(write, options, small):
    encoder = text_encoder(small["chatml"])
    path = write("rows.jsonl", [{"text": "Blue."}, {"text": "A green \x1b[31mcolour."}])
    data = load_data(options(path), encoder, max_length=200, seed=0, progress=False)
    shown = render_preview(data, encoder, [0], color=False)
    head, rest = [encoder.tokenizer.decode(encoder.tokenize([t])[0][:1]) for t in ("Blue.", "A green")]
    assert f"--- a document ---\n{head}[[{'Blue.'[len(head) :]}<|end|>]]" in shown
    assert f"--- a document ---\n{rest}[[{'A green '[len(rest) :]}\\x1b[31mcolour.<|end|>]]" in shown
    assert "2 documents read: 1 training and 0 held-out windows of at most 200 tokens" in shown
    assert data.train.example(0).messages[0].content == encoder.tokenizer.decode(data.train[0].input_ids)


def test_the_selected_rows(tmp_path, sftmix):
    words = [*make_tiny(tmp_path).options, "--no_color", "--rows", "1000"]
    everything = sftmix("preview", *words)
    chosen = sftmix("preview", *words, "--selector", "Longest", "--selector.k", "3")
    assert (everything.code, chosen.code) == (0, 0)
    assert "examples selected by Longest" in chosen.out
    assert chosen.out.count("[[") == 3 < everything.out.count("[[")

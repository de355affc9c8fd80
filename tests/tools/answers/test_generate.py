"""`generate`: the same tokens in any batch, drawn as the probabilities say, and continued wherever it was killed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from sftmix.disk.appended import append_batch
from sftmix.ranks.rng import generator
from sftmix.tools.answers.answering import COLUMNS, answered, generated
from sftmix.tools.answers.options import AnswerOptions, Question
from sftmix.tools.evaluate.harness import harness_of
from sftmix.tools.runs.loaded import load_finished, longest_together
from sftmix.tools.runs.models import FinishedModel
from sftmix.words.errors import ConfigError
from tests.fast import some_fast
from tests.model.test_models import random_model

WORDS = ("--models", "target,base", "--max_new_tokens", "12")


def questions_of(n: int) -> list[Question]:
    """Questions of very different lengths."""
    texts = ["Reverse the word. " * (1 + place % 5) + f"w{place}" for place in range(n)]
    return [Question(f"q{place}", ({"role": "user", "content": text},)) for place, text in enumerate(texts)]


def all_answers(loaded, questions, **options) -> dict[str, list]:
    answers, options = {}, AnswerOptions(**{"max_new_tokens": 12, **options})
    for batch in answered(loaded, questions, answers, options):
        assert all(answers[answer["key"]] is answer for answer in batch)
    assert not list(answered(loaded, questions, answers, options))
    return {q.id: [answers[loaded.name, q.id, turn] for turn in range(1 + len(q.follow_ups))] for q in questions}


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.7}], ids=str)
def test_the_batch_changes_no_token(lively, options):
    questions = questions_of(9)
    alone = all_answers(lively, questions, batch_size=1, **options)
    assert len({turns[0]["answers"] for turns in alone.values()}) > 6  # else any batch would give the same
    assert all_answers(lively, questions, batch_size=8, **options) == alone
    assert all_answers(lively, questions[::-1], batch_size=4, **options) == alone


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 40.0}
WINDOWS = {"num_key_value_heads": 1, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
WINDOWS |= {
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}
WINDOWS |= {"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"], "hc_mult": 3}
OTHERS = {
    "DeepseekV4": SMALL | HEADS | WINDOWS | {"mlp_layer_types": ["moe"] * 2},
    "MiniMax": SMALL | HEADS | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "Rwkv": SMALL | {"attention_hidden_size": 32, "context_length": 256},
    "RecurrentGemma": SMALL | HEADS | {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "Phi3": SMALL | HEADS | {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    "Llama": SMALL | HEADS | {"rope_parameters": DYNAMIC, "max_position_embeddings": 32},
    "FalconH1": SMALL | HEADS | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}
"""What padding or a longer neighbour changes in transformers 5.23, and last one that has states and is not changed."""


@pytest.mark.parametrize("family", some_fast(OTHERS, every=3))
def test_the_batch_changes_no_token_of_models_that_see_padding_or_longer_rows(target, family):
    options = {"vocab_size": len(target.encoder.tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = random_model(getattr(transformers, f"{family}Config")(**OTHERS[family] | options))
    with torch.no_grad():  # whose greedy answers hang on all of the prompt
        for weight in model.parameters():
            weight.mul_(1.0 if weight.dim() < 2 else 3.0)
    longest = {"FalconH1": sys.maxsize, "Phi3": 32, "Llama": 32}.get(family, 0)
    loaded, questions = (
        target._replace(model=model, context=256, together=longest_together(model, family)),
        questions_of(9),
    )
    alone = all_answers(loaded, questions, batch_size=1)
    assert all_answers(loaded, questions, batch_size=8) == alone
    assert loaded.together == longest


def test_the_probe_fills_the_longest_window_of_compressed_tokens():
    layers = {"layer_types": ["heavily_compressed_attention"] * 2, "vocab_size": 97}  # of 128 tokens each
    model = random_model(transformers.DeepseekV4Config(**OTHERS["DeepseekV4"] | layers))
    assert longest_together(model, "windows") == 0


def test_a_model_that_sees_padding_is_loaded_to_answer_one_by_one(target, tmp_path, capsys):
    shape = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}
    config = transformers.RwkvConfig(vocab_size=len(target.encoder.tokenizer), **shape)
    random_model(config).save_pretrained(tmp_path)
    target.encoder.tokenizer.save_pretrained(tmp_path)
    loaded = load_finished(FinishedModel("rwkv", str(tmp_path), None))
    assert harness_of(loaded, 4).batch_size == 1
    assert harness_of(target, 4).batch_size == 4
    assert harness_of(target._replace(context=None), 4).batch_size == 4
    assert harness_of(target._replace(context=256, together=32), 4).batch_size == 1  # LongRoPE's border
    assert harness_of(target._replace(context=32, together=32), 4).batch_size == 4  # lm-eval cuts at the context
    assert (
        "model rwkv: a batch changes answers, so prompts of more than 0 tokens are answered alone"
        in capsys.readouterr().err
    )


def test_greedy_tokens_are_the_argmax_of_the_model_alone(lively):
    """Token by token without a cache, padding or a mask: what one would write by hand."""
    for question in questions_of(3):
        ids = lively.render(question.messages)
        prompt = len(ids)
        while len(ids) < prompt + 12 and (len(ids) == prompt or ids[-1] not in lively.stop_ids):
            with torch.no_grad():
                ids = [*ids, int(lively.model(torch.tensor([ids])).logits[0, -1].argmax())]
        (turn,) = all_answers(lively, [question])[question.id]
        assert turn["answers"] == lively.text_of(ids[prompt:])
        assert (turn["prompt_tokens"], turn["answer_tokens"]) == (prompt, len(ids) - prompt)
        assert turn["finish"] == ("stop" if ids[-1] in lively.stop_ids else "length")


@pytest.mark.parametrize(
    ("name", "turn", "seed", "temperature", "top_p"),
    [
        ("a", 0, 42, 1.0, 1.0),
        ("b", 0, 42, 1.0, 1.0),
        ("a", 1, 42, 1.0, 1.0),
        ("a", 0, 7, 1.0, 1.0),
        ("a", 0, 42, 2.0, 0.5),
    ],
)
def test_a_token_is_drawn_for_the_seed_the_id_the_turn_and_the_position(lively, name, turn, seed, temperature, top_p):
    """The one in whose share of [0, 1), in the order of the vocabulary, the number of the position falls.

    Of the likeliest tokens those have shares that reach top_p together, at this temperature.
    """
    prompt, numbers = lively.render(questions_of(1)[0].messages), generator(seed, "answer", name, turn).random(12)
    options = AnswerOptions(seed=seed, top_p=top_p)
    (ids,) = generated(lively, {("", name, turn): prompt}, 12, temperature, options)
    with torch.no_grad():
        logits = lively.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    likeliest, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    likeliest[likeliest.cumsum(-1) - likeliest >= top_p] = 0
    shares = torch.zeros_like(likeliest).scatter(-1, order, likeliest).cumsum(-1)
    assert ids == [int((row <= number * row[-1]).sum()) for row, number in zip(shares, numbers, strict=False)]


def test_a_prompt_may_fill_the_context_and_not_more(lively):
    """Answers end at the context, also beside shorter prompts; a prompt without room is named, never cut."""
    word = " w0" * 400
    ids = lively.encoder.tokenizer(word, add_special_tokens=False)["input_ids"]
    long = Question("long", ({"role": "user", "content": word},))
    fits = Question("fits", ({"role": "user", "content": lively.encoder.decode(ids[: lively.context - 30])},))
    left = lively.context - len(lively.render(fits.messages))
    assert 0 < left < 60
    turns = all_answers(lively, [long, fits, *questions_of(2)], max_new_tokens=64, batch_size=4)
    assert (turns["long"][0]["answers"], turns["long"][0]["finish"]) == (None, "prompt_too_long")
    assert turns["fits"][0]["answer_tokens"] <= left
    alone = all_answers(lively, questions_of(2), max_new_tokens=64, batch_size=1)
    assert {name: turns[name] for name in alone} == alone


def test_follow_ups_come_after_the_models_own_answer(lively):
    question = Question("two", ({"role": "user", "content": "Add 2 and 3."},), follow_ups=("And 4?",))
    first, second = all_answers(lively, [question, *questions_of(2)])["two"]
    said = {"role": "assistant", "content": first["answers"]}
    after = Question("x", (*question.messages, said, {"role": "user", "content": "And 4?"}))
    (answer,) = all_answers(lively, [after])["x"]
    assert answer == {**second, "key": (lively.name, "x", 0)}


# ----------------------------------------------------------------------------------------- files, resuming


@pytest.fixture(scope="module")
def made(finished, generate, tmp_path_factory):
    """The held-out rows, answered by two models of the run."""
    to = tmp_path_factory.mktemp("made") / "answers.jsonl"
    generate(finished.path, to, *WORDS)
    return to


def test_a_line_has_all_models_beside_one_another(made, finished):
    lines = [json.loads(line) for line in made.read_text().splitlines()]
    held_out = [json.loads(line) for line in finished.tiny.eval.read_text().splitlines()]
    assert [line["reference"] for line in lines] == [row["output"] for row in held_out]
    assert {tuple(line["answers"]) for line in lines} == {("target", "base")}
    assert any(len(set(line["finish"].values())) > 1 for line in lines)
    assert not made.with_name("answers.jsonl.parts").exists()


def write_parts(made, to, **changed):
    """Leave the parts of a kill after the first model, with other values of some columns."""
    for line in made.read_text().splitlines():
        row = json.loads(line)
        columns = {name: row[name]["target"] for name in COLUMNS}
        append_batch(Path(f"{to}.parts"), [{"key": ("target", row["id"], 0), **columns, **changed}])


@pytest.mark.parametrize("cut", [1, 700, 10**6], ids=lambda n: f"{n} bytes left")
def test_killed_anywhere_it_ends_with_the_same_bytes(made, finished, generate, tmp_path, cut):
    """A kill leaves the parts cut at any byte; the last model may not have begun."""
    to, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.parts"
    shutil.copy(f"{made}.inputs.json", f"{to}.inputs.json")
    write_parts(made, to)
    part.write_bytes(part.read_bytes()[:cut])
    generate(finished.path, to, *WORDS)
    assert to.read_bytes() == made.read_bytes()


def test_parts_whose_inputs_are_gone_are_not_read(made, finished, generate, tmp_path):
    """They may be of other options: whoever wants these removes FILE.inputs.json."""
    to = tmp_path / "answers.jsonl"
    write_parts(made, to, answers="of other options")
    generate(finished.path, to, *WORDS)
    assert to.read_bytes() == made.read_bytes()


def test_a_finished_file_is_read_back_and_other_options_are_refused(made, finished, generate):
    before = made.read_bytes()
    generate(finished.path, made, *WORDS)
    assert made.read_bytes() == before
    with pytest.raises(ConfigError, match="max_new_tokens: 12 -> 13"):
        generate(finished.path, made, *WORDS[:3], "13")
    with pytest.raises(ConfigError, match="was made with other inputs"):
        generate(finished.path, finished.tiny.eval, *WORDS)


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-9], lambda raw: raw.replace(b"a", b"b", 1)])
def test_a_damaged_file_is_not_taken_as_done(made, finished, generate, tmp_path, damage):
    to, inputs = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.inputs.json"
    shutil.copy(f"{made}.inputs.json", inputs)
    to.write_bytes(damage(made.read_bytes()))
    with pytest.raises(ConfigError, match="is not as it was written"):
        generate(finished.path, to, *WORDS)
    written = json.loads(inputs.read_text())
    inputs.write_text(json.dumps({key: value for key, value in written.items() if key != "answers_sha256"}))
    write_parts(made, to)
    generate(finished.path, to, *WORDS)  # killed before its hash was there
    assert to.read_bytes() == made.read_bytes()


def test_texts_with_any_line_separator_are_read_back(finished, generate, tmp_path):
    text, prompts = "one\u2028two\u2029three\x85four\x0bfive\nsix", tmp_path / "rows.jsonl"
    prompts.write_text(json.dumps({"instruction": text}))
    for _ in range(2):
        generate(finished.path, tmp_path / "to", "--prompts", prompts, *WORDS)
    assert json.loads((tmp_path / "to").read_bytes())["messages"][0]["content"] == text


def test_the_command_says_what_happened(sftmix, finished, tmp_path):
    to = tmp_path / "answers.jsonl"
    words = ["generate", str(finished.path), "--to", str(to), "--max_new_tokens", "4", "--system", "Be brief."]
    done = sftmix(*words)
    assert done.code == 0, done.err
    assert done.out.split() == [str(to)]
    assert done.err.endswith("\nanswers of target: 11 stop\n")
    assert json.loads(to.read_text().splitlines()[0])["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_options_that_errors_of_prompts_name_are_taken_over_those_of_the_run(sftmix, finished, tmp_path):
    prompts, to = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    turn = {"role": "asker", "content": "Is it?"}
    words = ("--prompts", str(prompts), "--to", str(to), "--max_new_tokens", "2")
    for place in (finished.path, finished.tiny.model):
        for row, remedy, given in (
            ({"q": "Is it?"}, "data.columns gives them other names", ("--data.columns", "{prompt: q}")),
            ({"messages": [turn]}, "data.roles adds roles", ("--data.roles", "{asker: user}")),
        ):
            prompts.write_text(json.dumps(row))
            done = sftmix("generate", str(place), *words)
            assert (done.code, remedy in done.err) == (3, True), done.err
            done = sftmix("generate", str(place), *words, *given)
            assert done.code == 0, done.err
            assert json.loads(to.read_text())["messages"] == [{"role": "user", "content": "Is it?"}]
            for path in tmp_path.glob("answers*"):
                path.unlink()
    for given, said in (
        (("--data.columns", "{promt: q}"), "data.columns: no format that row_format or data.format chooses has promt"),
        (("--data.roles", "{asker: usr}"), "data.roles maps asker to usr; allowed: "),
        (("--format", "mt_bench", "--data.columns", "{prompt: q}"), "are for --prompts that are rows; leave them out"),
    ):
        done = sftmix("generate", str(finished.path), *words, *given)
        assert (done.code, said in done.err) == (2, True), done.err

"""The context of a model by its config, and lengths from which LongRoPE and dynamic RoPE change a whole batch."""

import pytest
import transformers

from sftmix.model.compared import say_once
from sftmix.pipeline.rows import resolve_max_length
from sftmix.words.errors import ConfigError
from tests.model.test_models import TINY

SHAPE = TINY | {"max_position_embeddings": 256}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (transformers.Qwen2Config(**SHAPE | {"max_position_embeddings": 64}, rope_parameters=YARN), 256),
        (transformers.Qwen2Config(**SHAPE | {"max_position_embeddings": 512}, rope_parameters=YARN), 512),
        (transformers.MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=2, max_seq_len=192), 192),
        (transformers.LlamaConfig(**SHAPE), 256),
    ],
    ids=["yarn", "yarn within the context", "mpt", "llama"],
)
def test_the_context_is_the_one_that_the_model_was_made_for(tmp_path, capsys, config, context):
    config.save_pretrained(tmp_path)
    assert resolve_max_length(context, str(tmp_path), key="data.max_length") == context
    assert resolve_max_length(None, str(tmp_path), key="data.max_length") == context
    with pytest.raises(ConfigError, match=rf"data\.max_length is {context + 1}, but .* a context of {context} tokens"):
        resolve_max_length(context + 1, str(tmp_path), key="data.max_length")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        transformers.Phi3Config(**SHAPE, original_max_position_embeddings=64, rope_parameters=LONG),
        transformers.LlamaConfig(
            **SHAPE,
            rope_parameters=LONG | {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=["longrope", "dynamic"],
)
def test_lengths_on_both_sides_of_the_border_get_a_line(tmp_path, capsys, config):
    config.save_pretrained(tmp_path)
    say_once.cache_clear()
    assert resolve_max_length(64, str(tmp_path), key="data.max_length") == 64
    assert "changes the positions" not in capsys.readouterr().err
    for requested in (65, 65):
        assert resolve_max_length(requested, str(tmp_path), key="data.max_length") == 65
    told = "data.max_length is 65: a row of more than 64 tokens changes the positions of all rows in its batch"
    assert capsys.readouterr().err.count(told) == 1

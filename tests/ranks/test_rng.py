"""Counter-based randomness: frozen values, independence of the key's parts, the same numbers in any process."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.ranks.rng import generator, stable_hash
from tests.tiny import ROOT

KEY = (0, "lambda", 12, "id-c", "id-u")
PARTS = st.lists(st.one_of(st.integers(), st.text(max_size=4)), max_size=4)


@given(PARTS, PARTS)
def test_different_keys_have_different_hashes(a, b):
    assert (stable_hash(*a) == stable_hash(*b)) == (a == b)


def test_types_and_boundaries_of_the_parts_count():
    assert stable_hash(1) != stable_hash("1")
    assert stable_hash("a", "b") != stable_hash("ab") != stable_hash("b", "a")
    assert stable_hash("astr:b") != stable_hash("a", "b")
    assert 0 <= stable_hash("a") < 2**128


def test_numpy_values_key_like_plain_ones():
    plain = generator(0, "pairs", 3, "x").random(4)
    other = generator(np.int64(0), "pairs", np.int32(3), np.str_("x")).random(4)
    np.testing.assert_array_equal(plain, other)
    assert stable_hash(1, 0.5) == stable_hash(np.int64(1), np.float32(0.5)) != stable_hash(True, 0.5)


def test_values_are_frozen():
    """Lambdas, pairs and halves of finished runs hang on them: as documented, and as numbers."""
    text = b"int:1:0str:6:lambdaint:2:12str:4:id-cstr:4:id-u"
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    assert stable_hash(*KEY) == key == 314367350407496690768271103234636613681
    assert generator(*KEY).random() == 0.38957602853089635


@pytest.mark.parametrize("place", range(len(KEY)))
def test_each_part_of_the_key_matters(place):
    changed = list(KEY)
    changed[place] = 99 if isinstance(changed[place], int) else "other"
    assert generator(*KEY).random() != generator(*changed).random()


def test_another_process_draws_the_same_numbers():
    code = f"from sftmix.ranks.rng import generator; print(generator(*{KEY!r}).random(3).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(generator(*KEY).random(3).tolist())

"""A model for the tests of a step."""

import pytest

from tests.toy import toy_model

pytest.register_assert_rewrite("tests.training.loop_claims")  # a claim that fails shows its values, as a test does


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return toy_model(tied=request.param)

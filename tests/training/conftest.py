"""A model for the tests of a step."""

import pytest

from tests.toy import toy_model


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return toy_model(tied=request.param)

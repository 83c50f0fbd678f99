"""What a null space covers of the models that people train, and that what was captured stays: toy sizes."""

import pytest

import architectures
from test_promise import package


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.NAMES)
def test_an_architecture_is_covered_and_keeps_what_was_captured(name):
    if not name.startswith("nn."):
        package("transformers")
    found = architectures.measure(name)
    assert found.covered >= 0.95 and found.said == []
    assert found.moved <= 1e-3
    assert found.learned <= 0.97

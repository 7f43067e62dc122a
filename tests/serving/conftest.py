"""A server around the module's engine, and OpenAI's client for it."""

import openai
import pytest
from serving_support import KEY, listening, served_model


@pytest.fixture(scope="module")
def served():
    return served_model()


@pytest.fixture
def address(engine):
    with listening(engine, KEY) as address:
        yield address


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client

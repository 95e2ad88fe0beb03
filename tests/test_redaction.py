"""What is a secret, and what only looks like one to a careless pattern."""

from __future__ import annotations

import pytest

from batchgen.redaction import redact

ENVIRONMENT = {
    "HF_TOKEN": "my-own-token",
    "OPENAI_API_KEY": "another-secret",
    "SERVICE_TOKEN": "short",
    "TOKENIZERS_PARALLELISM": "true-as-ever",
    "HOME": "/home/ann",
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot reach it with my-own-token", "cannot reach it with [hidden]"),
        ("another-secretary", "[hidden]ary"),
        ("s3://ann:pass@bucket/x", "s3://[hidden]@bucket/x"),
        ("'https://ann@host/x'", "'https://[hidden]@host/x'"),
        ("https://host/a/b.jsonl?X-Amz-Signature=abc&x=y, and", "https://host/a/b.jsonl?[hidden] and"),
        ("--set api_key=abc", "--set api_key=[hidden]"),
        ("--hf-token=abc", "--hf-token=[hidden]"),
        ("Bearer hf_0123456789abcdefghijklmn.", "Bearer [hidden]."),
    ],
)
def test_secret_is_hidden(text: str, shown: str) -> None:
    assert redact(text, ENVIRONMENT) == shown


@pytest.mark.parametrize(
    "text",
    [
        "short true-as-ever /home/ann",
        "--max-new-tokens=64 step_tokens=2048 max_tokens=5",
        "https://host/path.jsonl is there? yes",
        "ann@host.example wrote",
        "the prompt has 12 tokens; is it a secret? the password is missing",
        "--model ORG/NAME@0123456789abcdef0123456789abcdef01234567",
        "org/hf_model sk-short",
    ],
)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text, ENVIRONMENT) == text

"""Takes secrets out of what is kept or shown: a run folder and a job's log are read by more people than the shell that
started the run."""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "[hidden]"

# Variables that hold a secret, by a whole word of their name: HF_TOKEN and API_KEY, not TOKENIZERS_PARALLELISM.
_NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|APIKEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
_SHORTEST = 8  # characters of a value: a shorter one would be found in ordinary words

_PATTERNS = (
    (re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s'\"@]*@"), rf"\1{HIDDEN}@"),  # user and password of an address
    (re.compile(r"(\bhttps?://[^\s'\"?]*\?)[^\s'\"]+"), rf"\1{HIDDEN}"),  # its query: signed addresses have it there
    (
        re.compile(
            r"(?i)((?<![a-z])(?:\w*[_-])?(?:token|secret|password|passwd|api[_-]?key|access[_-]?key)=)[^\s'\",]+"
        ),
        rf"\1{HIDDEN}",
    ),
    # As the hub, OpenAI, GitHub and AWS write theirs.
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16})\b"), HIDDEN),
)


def redact(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the secrets that `environment` holds, and without what looks like one."""
    secrets = (value for name, value in environment.items() if _NAMES.search(name) and len(value) >= _SHORTEST)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text

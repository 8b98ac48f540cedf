"""Remove secrets from texts: tokens, passwords and signatures in addresses.

A signed address gives access to the file until it expires. Every text that could hold one is redacted here
before it becomes a message, a log or a traceback.
"""

import base64
import re
from urllib.parse import quote

_HIDDEN = "..."
# A shorter text also occurs in other words. Tokens of the Hub have 37 characters.
_MIN_NCHARS = 4
_MIN_UNIQUE_NCHARS = 12
# The secrets of this process, in all forms that a text can contain.
_secrets: set[str] = set()
_PATTERNS = (
    # user:password@host
    (re.compile(r"(://)[^\s/?#'\"<>@]*(?:@[^\s/?#'\"<>@]*)*@"), rf"\1{_HIDDEN}@"),
    # The query of an address, absolute or relative.
    (re.compile(r"(://[^\s?'\"<>]*\?)[^\s'\"<>]*"), rf"\1{_HIDDEN}"),
    (
        re.compile(
            r"\b((?:X-(?:Amz|Goog|Xet)-[\w-]+|Signature|Policy|Key-Pair-Id|Expires|sig|token|access_token|password)=)"
            r"[^\s&'\"<>]+",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{4,}"), rf"\1 {_HIDDEN}"),
    # A token of the Hub has 34 letters and digits; names of files begin with hf_ too.
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), f"hf_{_HIDDEN}"),
)


def remember_secret(text: str) -> None:
    """Hide a text, and its forms in addresses and headers, from now on.

    A text of less than four characters is ignored, because it would also occur in other words.
    """
    if len(text) >= _MIN_NCHARS:
        _secrets.update((text, quote(text, safe=""), quote(text), base64.b64encode(text.encode()).decode()))


def has_secret(data: bytes) -> bool:
    """Whether a secret of this process occurs in an answer.

    A short password does not count, because a correct answer may contain it as a word.
    """
    return any(secret.encode() in data for secret in tuple(_secrets) if len(secret) >= _MIN_UNIQUE_NCHARS)


def redact(text: str) -> str:
    """Return a text without secrets."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_errors(error: BaseException) -> BaseException:
    """Remove secrets from an error and its causes, which a traceback prints too."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in one.args)
        waiting += [other for other in (one.__cause__, one.__context__) if other is not None]
    return error

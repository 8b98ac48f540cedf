"""Write texts as YAML that every reader reads as the same texts.

PyYAML's own writer writes a text without quotes if PyYAML reads it as a text. Readers of YAML 1.2, such as OmegaConf
and ruamel.yaml, read `1e3` and `0o17` as numbers. That writer is also slow: about 10,000 texts a second.
"""

import re
from collections.abc import Iterable

# A text that needs no quotes, unless it looks like another type.
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*")
# This has every form of a number, date or special value in YAML 1.1, YAML 1.2, PyYAML, ruamel.yaml or OmegaConf. It
# may also have other texts.
_TYPED = re.compile(
    r"[0-9_.:+\-]*(?:e[+\-]?[0-9_]*)?|0[xob][0-9a-f_]*|\.(?:inf|nan)|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*"
    r"|y|n|yes|no|on|off|true|false|null|nan|inf",
    re.IGNORECASE,
)
# A single-quoted text can hold all of these.
_PRINTABLE = re.compile(r"[ -~]+")


def is_plain(text: str) -> bool:
    """Whether a text without quotes is a text in every version of YAML.

    It must be one in a list and in a comment too.
    """
    return _PLAIN.fullmatch(text) is not None and _TYPED.fullmatch(text) is None


def scalar(text: str) -> str:
    """Write a text on one line, in quotes if it needs them."""
    if is_plain(text):
        return text
    if _PRINTABLE.fullmatch(text):
        return "'" + text.replace("'", "''") + "'"
    return '"' + "".join(map(_escape, text)) + '"'


def listing(key: str, texts: Iterable[str], indent: str = "") -> str:
    """Write a key with a list of texts, an entry a line."""
    lines = [f"{indent}- {scalar(text)}\n" for text in texts]
    return f"{indent}{key}:\n{''.join(lines)}" if lines else f"{indent}{key}: []\n"


def _escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if " " <= character <= "~":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

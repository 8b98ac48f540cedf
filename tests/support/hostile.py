"""Hostile names: strings that a careless program would run, follow or obey."""

CORPUS = {
    "color": "\x1b[31mred",
    "clear screen": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link (OSC 8)": "\x1b]8;;http://evil.example\x1b\\\\click\x1b]8;;\x1b\\\\",
    "clipboard (OSC 52)": "\x1b]52;c;ZXZpbA==\x07",
    "C1 CSI": "\x9b31m",
    "bidi override": "a\u202eb\u2066c",
    "zero width": "a\u200bb\ufeff",
    "carriage return": "safe\revil",
    "newline": "a\nb: !!python/object/apply:os.system [id]",
    "line separator": "a\u2028b\u2029c",
    "NUL": "a\0b",
    "rich markup": "[bold red]x[/bold red][/x][link=http://evil.example]y[/link]",
    "script": "</script><script>alert(1)</script>",
    "img": "<img src=x onerror=alert(1)>",
    "YAML tag": "!!python/object/apply:os.system",
    "YAML comment": "a # b",
    "YAML list": "- a",
    "YAML null": "null",
    "YAML octal": "0o17",
    "regex": ".*",
    "regex bomb": "(a+)+$",
    "regex alternation": "a|b",
    "CSV formula": '=HYPERLINK("http://evil.example")',
    "CSV plus": "+1+1|cmd",
    "path up": "../../etc/passwd",
    "path absolute": "/etc/passwd",
    "path Windows": "C:\\\\evil",
    "shell": "$(touch evil); `touch evil`; 'touch evil",
    "format": "{0.__class__} %s %n",
    "quotes": "a\"b'c\\\\",
    "other scripts": "ｆｕｌｌ ворлд 世界 🦙",
    "long": "x" * 300,
}


def inert(text: str) -> bool:
    """Whether a terminal only shows this text."""
    return all(c == "\n" or c.isprintable() for c in text)

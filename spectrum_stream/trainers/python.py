"""Python: a function that freezes a torch model, for any trainer that takes a model."""

import ast
import re
import warnings
from collections.abc import Collection, Iterable, Iterator

from ..errors import ResultError
from ..selection.select import Selection
from .patterns import check_count
from .targets import targets_of
from .trainer import Entry, Trainer, exact

_CODE = '''"""The parameters to train, and a function that freezes all others of a torch model."""

TRAINED = {trained}

# Trained if the model has them under these names.
TRAINED_IF_THERE = {always}


def freeze(model):
    """Train the parameters above and freeze the rest; if one is missing, raise ValueError and change nothing."""
    parameters = dict(model.named_parameters())
    missing = set(TRAINED) - set(parameters)
    if missing:
        raise ValueError(f"the model has no {{sorted(missing)[0]}} ({{len(missing)}} are missing)")
    for name, parameter in parameters.items():
        parameter.requires_grad = name in TRAINED or name in TRAINED_IF_THERE
'''


class Python(Trainer):
    """A trainer that takes a torch model."""

    name = "python"
    suffix = "py"
    advice = "call freeze(model) before you make the trainer or the optimizer"
    takes = "Python"

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the source.

        Raises:
            ResultError: no_such_parameter, nothing_chosen.
        """
        targets = targets_of(selection, parameters)
        trained = dict.fromkeys(target.parameter for target in targets.chosen)
        always = (name for name in targets.always if name not in trained)
        return _CODE.format(trained=_list_source(trained), always=_list_source(always))

    def entries(self, text: str) -> list[Entry]:
        """Read both lists as tokens, without parsing or running the source.

        Raises:
            SyntaxError: a text is not closed, or has an escape that does not exist.
            KeyError: a list is missing.
            ResultError: not_a_selection, one of the two is not a list of texts; too_large.
        """
        lists = _read_lists(text)
        return [exact(name) for name in (*lists["TRAINED"], *lists["TRAINED_IF_THERE"])]


# The tokens of Python that matter here. Python's own parser takes gigabytes for a long chain of operators.
_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\f]+|\\\n|\#[^\n]*)
    | (?P<newline>\n)
    | (?P<string>[rRuU]?(?:\"{3}(?:[^"\\]|\\.|"(?!""))*+\"{3} | '{3}(?:[^'\\]|\\.|'(?!''))*+'{3}
        | (?!\"{3}|'{3})(?:"(?:[^"\\\n]|\\.)*+" | '(?:[^'\\\n]|\\.)*+')))
    | (?P<open>["'])
    | (?P<word>\w+)
    | (?P<sign>[=!<>:+\-*/%&|^@]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_LISTS = ("TRAINED", "TRAINED_IF_THERE")
MAX_TOKENS = 2_000_000
# Python has the same limit.
_MAX_DEPTH = 200
# A list of texts without escapes, as `render` writes it, is read at once.
_PLAIN_TEXT = re.compile(r""""([^"\\\n]*+)"|'([^'\\\n]*+)'""")
_PLAIN_LIST = re.compile(
    r"""\[\s*+(?:(?:"(?!"")[^"\\\n]*+"|'(?!'')[^'\\\n]*+')\s*+(?:,\s*+|(?=\])))*+\](?=[ \t]*+(?:\n|\Z))"""
)
# The tokens of a name, its type and `=`.
_MAX_START = 20
_Token = tuple[str, str]


def _read_lists(text: str) -> dict[str, list[str]]:
    lists = {}
    for name, value in _assignments(text):
        lists[name] = _read_texts(name, value)
    return lists


def _assignments(text: str) -> Iterator[tuple[str, list[_Token]]]:
    """Yield the tokens of each value that is assigned to one of the lists.

    Assignments in functions do not count.
    """
    depth, line, position, count = 0, list[_Token](), 0, 0
    # An indented line belongs to a function.
    is_first = is_flush = True
    while (found := _TOKEN.match(text, position)) is not None:
        kind, token, position = str(found.lastgroup), found[0], found.end()
        count += 1
        check_count(count, MAX_TOKENS, "words and signs")
        if kind == "open":
            raise SyntaxError("a text is not closed")
        if kind == "space":
            is_flush = is_flush and not (is_first and token[0] != "#")
        elif kind == "newline" and not depth:
            if line:
                yield line[0][1], line
            line, is_first, is_flush = [], True, True
        elif len(line) == 2 and token == "[" and (whole := _PLAIN_LIST.match(text, found.start())) is not None:
            line.append(("list", whole[0]))
            position = whole.end()
        elif kind != "newline":
            depth += (token in ("(", "[", "{")) - (token in (")", "]", "}"))
            if not 0 <= depth <= _MAX_DEPTH:
                raise SyntaxError("the brackets do not match")
            if line or (is_first and is_flush and token in _LISTS):
                line.append((kind, token))
            is_first = False
            if len(line) > _MAX_START and not _is_list_part(kind, token):
                raise _not_a_list(line[0][1])
    if line:
        yield line[0][1], line


def _is_list_part(kind: str, token: str) -> bool:
    return kind == "string" or token in (",", "[", "]", "(", ")", "{", "}")


def _read_texts(name: str, line: list[_Token]) -> list[str]:
    """Read `NAME = [TEXT, ...]`, or a tuple or a set.

    Raises:
        ResultError: not_a_selection, the line is something else.
    """
    start = next((i for i, token in enumerate(line[:_MAX_START]) if token == ("sign", "=")), 0)
    is_typed = line[1:2] == [("sign", ":")]
    value = line[start + 1 :]
    if start == 1 and len(value) == 1 and value[0][0] == "list":
        texts = [one or other for one, other in _PLAIN_TEXT.findall(value[0][1])]
        check_count(len(texts))
        return texts
    brackets = {"[": "]", "(": ")", "{": "}"}
    bracket = value[0][1] if value and value[0][0] == "sign" else ""
    if bracket:
        if value[-1] != ("sign", brackets.get(bracket)):
            raise _not_a_list(name)
        value = value[1:-1]
    texts = []
    is_open = has_comma = False
    for kind, token in value:
        if kind == "string":
            text = _text_of(token)
            # Two texts without a comma are one.
            texts[len(texts) - is_open :] = [texts[-1] + text if is_open else text]
            is_open = True
        elif token == "," and is_open:
            is_open, has_comma = False, True
        else:
            raise _not_a_list(name)
    is_list = bracket in ("[", "{") or has_comma or (bracket == "(" and not value)
    if not is_list or not (start == 1 or (is_typed and start)):
        raise _not_a_list(name)
    check_count(len(texts))
    return texts


def _text_of(token: str) -> str:
    if token[0] in "\"'" and "\\" not in token and token[1] != token[0]:
        return token[1:-1]
    with warnings.catch_warnings():
        # Python warns about an escape that it does not know.
        warnings.simplefilter("ignore")
        return str(ast.literal_eval(token))


def _not_a_list(name: str) -> ResultError:
    return ResultError(
        f"{name} is not a list of texts", reason="not_a_selection", hint=f'write `{name} = ["NAME", ...]`'
    )


def _list_source(names: Iterable[str]) -> str:
    lines = [f"    {name!a},\n" for name in names]
    return f"[\n{''.join(lines)}]" if lines else "[]"

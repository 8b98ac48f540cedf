"""A coverage-guided fuzzer of all readers of config.json, to be run by hand.

    pip install atheris && python -m tests.model.fuzz_config -max_total_time=300

It changes configs of real families. No exception may be raised, and each value has its type and its limit. A config
that the headers do not contradict has no more layers than they have.
"""

import sys
from copy import deepcopy

import atheris

with atheris.instrument_imports(include=["spectrum_stream"]):
    from tests.support.configs import FAMILIES, HOSTILE, QUANTIZATIONS, find_places, read_all, real_config


def one(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    config = real_config(given.ConsumeIntInRange(0, len(FAMILIES) - 1))
    names = sorted({key for _, key in find_places(config) if isinstance(key, str)})
    for _ in range(given.ConsumeIntInRange(1, 8)):
        places = list(find_places(config))
        if not places:
            break
        container, key = places[given.ConsumeIntInRange(0, len(places) - 1)]
        match given.ConsumeIntInRange(0, 5):
            case 0:
                value = given.PickValueInList(list(HOSTILE))
            case 1:
                value = given.ConsumeInt(8)
            case 2:
                value = given.ConsumeUnicode(20)
            case 3:
                value = given.PickValueInList(list(QUANTIZATIONS))
            case 4:
                value = {names[given.ConsumeIntInRange(0, len(names) - 1)]: container[key]}
            case _:
                value = [container[key], given.ConsumeFloat()]
        if isinstance(container, dict) and given.ConsumeBool():
            key = names[given.ConsumeIntInRange(0, len(names) - 1)]
        # A value must not contain itself.
        container[key] = deepcopy(value)
    read_all(config)


def main() -> None:
    real_config(0)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

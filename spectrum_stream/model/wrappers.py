"""Prefixes that wrappers of a model add to the names of its parameters, in a checkpoint and in a trainer."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

# Components that torch.compile, FSDP, activation checkpointing, Lightning and PEFT add anywhere in a name.
_COMPONENTS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|base_model\.model"
    r"|base_layer|modules_to_save\.[^.]+)\."
)
# The first four are never names of modules. The others can be, and count only if all names have them.
_UNAMBIGUOUS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_SHARED = ("module.", "pretrained_model.", "base_model.model.", "_model.")
# A prefix has at most this many components.
_MAX_COMPONENTS = 8
# The number of changes that are tried on all names.
_MAX_CANDIDATES = 6
# A name that is this common, `weight`, does not show a prefix.
_MAX_OWNERS = 4


def without_components(name: str) -> str:
    """Remove the components that wrappers add anywhere in a name: `layers._orig_mod.0` is `layers.0`."""
    return _COMPONENTS.sub("", name)


def remove_known_wrappers(names: Collection[str], weights: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove the prefixes that only wrappers have from the names of a model that is not known.

    Args:
        names: all names.
        weights: those of them that must share a prefix that a module could have too: `module.`.

    Returns:
        as `remove_wrappers`.
    """
    plain = _injective({name: _UNAMBIGUOUS.sub("", name) for name in names})
    removed = Counter(part for name in names if plain[name] != name for part in _UNAMBIGUOUS.findall(name))
    for _ in range(_MAX_COMPONENTS):
        shared = next((p for p in _SHARED if weights and all(plain[name].startswith(p) for name in weights)), None)
        if shared is None:
            break
        plain = _injective({name: there.removeprefix(shared) for name, there in plain.items()})
        removed[shared] += len(weights)
    return plain, tuple(prefix for prefix, _ in removed.most_common())


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the beginning of names: one prefix is removed, and another one added.

    A name without the removed prefix stays as it is.
    """

    removed: str = ""
    added: str = ""

    def fits(self, names: Collection[str]) -> bool:
        """Whether it can be the change of a wrapper, and does not move one layer to another place."""
        numbers = [re.search(r"(^|\.)[0-9]+\.", prefix) is not None for prefix in (self.removed, self.added)]
        if all(numbers):
            return False
        return not numbers[0] or 2 * sum(name.startswith(self.removed) for name in names) > len(names)

    def apply(self, name: str) -> str:
        """Return the changed name."""
        return self.added + name[len(self.removed) :] if name.startswith(self.removed) else name

    def apply_to_all(self, names: Iterable[str]) -> dict[str, str]:
        """Return each name with the changed one, where no two become the same."""
        found = {name: self.apply(name) for name in names}
        kept = {name for name, there in found.items() if name == there}
        taken = Counter(found.values())
        return {name: there for name, there in found.items() if taken[there] == 1 or name in kept}


def find_change(names: Collection[str], targets: Collection[str]) -> Change:
    """Find the change that makes the most names equal to a target, or none at all if it is as good.

    Targets are found by their endings, so that the time is linear in the number of names.
    """
    owners: dict[str, list[str]] = {}
    for target in targets:
        for prefix, tail in _splits(target):
            found = owners.setdefault(tail, [])
            if len(found) <= _MAX_OWNERS:
                found.append(prefix)
    votes: Counter[Change] = Counter()
    for name in names:
        # The longest common ending counts.
        prefix, added = next(((p, owners[tail]) for p, tail in _splits(name) if tail in owners), ("", []))
        if len(added) <= _MAX_OWNERS:
            votes.update(Change(prefix, one) for one in added)
    candidates = [Change(), *(change for change, _ in votes.most_common(_MAX_CANDIDATES) if change.fits(names))]
    every = frozenset(targets)
    return max(candidates, key=lambda change: len(every.intersection(change.apply_to_all(names).values())))


def remove_wrappers(
    names: Collection[str], weights: Collection[str], fits: Callable[[str], bool]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove the prefixes of wrappers from the names of a checkpoint, if they fit the model then.

    Args:
        names: all names.
        weights: those of them that must fit.
        fits: whether a name is one of the model's.

    Returns:
        each name without prefixes, no two the same; and the prefixes that were removed, most common first.
    """
    unchanged = {name: name for name in names}
    if all(map(fits, weights)):
        return unchanged, ()
    plain = _injective({name: without_components(name) for name in names})
    shared = _find_shared_prefix([plain[name] for name in weights], fits)
    shorter = _injective({name: there.removeprefix(shared) for name, there in plain.items()})

    def count(found: Mapping[str, str]) -> int:
        return sum(fits(found[name]) for name in weights)

    # The first of the best is the one that changes least.
    best = max((unchanged, plain, shorter), key=count)
    if best is unchanged:
        return unchanged, ()
    removed = Counter(part for name in names if best[name] != name for part in _COMPONENTS.findall(name))
    if best is shorter and shared:
        removed[shared] = sum(name.startswith(shared) for name in plain.values())
    return best, tuple(prefix for prefix, _ in removed.most_common())


def _find_shared_prefix(weights: Collection[str], fits: Callable[[str], bool]) -> str:
    """Find the prefix that most weights share and no name of the model has; "" if there is none."""
    misfits = sorted(name for name in weights if not fits(name))
    if 2 * len(misfits) <= len(weights):
        return ""
    # The names with a prefix are neighbors in this order. If they are the majority, the name in the middle has it.
    candidates = [prefix for prefix, _ in _splits(misfits[len(misfits) // 2]) if prefix]
    votes: dict[str, int] = {}
    for prefix in candidates:
        # The last component, `weight`, is not a name by itself.
        sharing = [name for name in misfits if name.startswith(prefix) and "." in name[len(prefix) :]]
        if 2 * len(sharing) > len(weights):
            votes[prefix] = sum(fits(name[len(prefix) :]) for name in sharing)
    prefix = min(votes, key=lambda prefix: (-votes[prefix], len(prefix)), default="")
    return prefix if 2 * votes.get(prefix, 0) > len(weights) else ""


def _injective(found: Mapping[str, str]) -> dict[str, str]:
    """Undo changes that give two tensors one name."""
    taken = Counter(found.values())
    undone = {name: there if taken[there] == 1 else name for name, there in found.items()}
    return undone if len(set(undone.values())) == len(undone) else {name: name for name in found}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Yield each prefix of whole components with the rest of the name, shortest prefix first."""
    end = 0
    for _ in range(_MAX_COMPONENTS + 1):
        yield name[:end], name[end:]
        end = name.find(".", end) + 1
        # The last component, `weight`, is the same for many names.
        if not end or "." not in name[end:]:
            return

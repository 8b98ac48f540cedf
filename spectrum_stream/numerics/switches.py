"""Change settings of torch for the whole process, and restore them.

The precision of float32 products is such a setting. If several threads need it, the first one to finish must not
restore it while others still compute.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# An object, the name of its attribute, and a value.
Setting = tuple[object, str, object]


@contextmanager
def switched(*settings: Setting) -> Iterator[None]:
    """Change settings within the context, and restore them afterwards.

    No other thread may change them meanwhile.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for setting in settings:
            setattr(*setting)
        yield
    finally:
        for setting in before:
            setattr(*setting)


class Switches:
    """Settings that several threads hold at once.

    The first user changes them, and the last one restores them.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._settings: tuple[Setting, ...] = ()
        self._restoring = ExitStack()

    @contextmanager
    def hold(self, *settings: Setting) -> Iterator[None]:
        """Apply settings within the context.

        A thread that needs other settings waits until no thread holds any.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._settings == settings)
            if not self._users:
                self._settings = settings
                self._restoring.enter_context(switched(*settings))
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                if not self._users:
                    self._restoring.close()
                self._changed.notify_all()

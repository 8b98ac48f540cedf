"""Selections as the files that trainers read: one trainer, one file, one row of the registry.

A trainer writes a file that trains exactly the chosen parameters, or fails and says why.
"""

from collections.abc import Mapping

from .axolotl import Axolotl
from .axolotl_plugin import AxolotlPlugin
from .distillkit import DistillKit
from .llama_factory import LlamaFactory
from .ms_swift import MsSwift
from .peft import Peft
from .plain_json import PlainJson
from .python import Python
from .sft_recipes import SftRecipes
from .soup import Soup
from .trainer import Trainer

# The first row is the default of `--format`: Spectrum writes for Axolotl.
_ROWS: tuple[Trainer, ...] = (
    Axolotl(),
    AxolotlPlugin(),
    SftRecipes(),
    MsSwift(),
    Peft(),
    DistillKit(),
    LlamaFactory(),
    Soup(),
    Python(),
    PlainJson(),
)

TRAINERS: Mapping[str, Trainer] = {trainer.name: trainer for trainer in _ROWS}
DEFAULT = _ROWS[0]

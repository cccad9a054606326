"""The court for the Megatron-core drop-in: real ``GPTModel``s, and Megatron's own 1F1B as the truth.

Importing this package imports megatron-core (seconds), once and quietly: see ``reference.megatron.importing``.
"""

from reference.megatron.importing import import_megatron

import_megatron()

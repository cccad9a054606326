"""Verifies the Megatron-core drop-in on real ``GPTModel``s, with Megatron's own 1F1B as the ground truth.

Importing this package imports megatron-core, which takes seconds, and silences its known warnings: see
``reference.megatron.importing``.
"""

from reference.megatron.importing import import_megatron

import_megatron()

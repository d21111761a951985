"""The command line, where the second of several processes fails while the others wait for it."""

from __future__ import annotations

import os
from itertools import count

from torch import Tensor

from nextstep_core.__main__ import main
from nextstep_core.errors import NextStepError
from nextstep_core.model.transformer import GatedMLP

if __name__ == "__main__":
    plain, calls = GatedMLP.forward, count(1)

    def fail(self: GatedMLP, x: Tensor) -> Tensor:
        if os.environ["RANK"] == "1" and next(calls) == 7:
            raise NextStepError("It failed here.")
        return plain(self, x)

    GatedMLP.forward = fail  # type: ignore[method-assign]
    main()

"""Results small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_merge.evaluation import ModelFacts, Results, Score


def rows(text: str) -> np.ndarray:
    """``"1101"`` as booleans."""
    return np.array([letter == "1" for letter in text])


@pytest.fixture
def results() -> Results:
    """Two tasks: ``a`` with OOD sets x and y and two corruptions, ``b`` with OOD set x alone; one merge failed.

    id:  a individual 8/10, merged 6/10; b individual 4/4, merged 3/4.
    ood: a merged x 1/4, y 3/4; b merged x 4/4. The mean of means is (0.5 + 1) / 2 = 0.75, over sets 2/3, over rows 2/3.
    """
    made = Results(["a", "b"])
    made.add(
        ModelFacts("merged <i>", method="Ties", parameters={"density": 0.2, "scale": (0.1, 0.3)}, seed=3,
                   selection="validation labels", selected={"scale": 0.3}, stored_parameters=22_713_216),
        [
            Score("merged <i>", "a", "id", "test", rows("1111110000")),
            Score("merged <i>", "b", "id", "test", rows("0111")),
            Score("merged <i>", "a", "ood", "ood_x", rows("1000")),
            Score("merged <i>", "a", "ood", "ood_y", rows("1110")),
            Score("merged <i>", "b", "ood", "ood_x", rows("1111")),
            Score("merged <i>", "a", "corrupted", "typos-3", rows("1100000000")),
            Score("merged <i>", "a", "corrupted", "case-3", rows("1111000000")),
        ],
    )  # fmt: skip
    made.add(
        ModelFacts("individual", "individual", stored_parameters=2 * 22_713_216),
        [
            Score("individual", "a", "id", "test", rows("1111011110")),
            Score("individual", "b", "id", "test", rows("1111")),
            Score("individual", "a", "ood", "ood_x", rows("1100")),
            Score("individual", "a", "ood", "ood_y", rows("1111")),
            Score("individual", "b", "ood", "ood_x", rows("1111")),
        ],
    )
    made.add(
        ModelFacts("pretrained", "pretrained"),
        [
            Score("pretrained", "a", "id", "test", rows("1000000000")),
            Score("pretrained", "b", "id", "test", rows("1000")),
        ],
    )
    made.add(ModelFacts("broken", error="the tensor 'w' holds NaN"))
    return made

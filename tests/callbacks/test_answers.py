"""How batches become logits: what a batch that is a dict needs, and what is said where it is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_merge.callbacks.answers import Answers
from lightning_merge.errors import UserError

IMAGES = torch.arange(12.0).reshape(3, 4)
BATCH = {"label": torch.tensor([0, 1, 1]), "image": IMAGES, "id": ["a", "b", "c"]}


class Plain(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def method(self, images: Tensor) -> Tensor:
        return self(images.flatten(1))

    def whole(self, batch: dict[str, Any]) -> Tensor:
        return self(batch["image"])

    def broken(self, images: Tensor) -> Tensor:
        raise TypeError("mine")


@pytest.mark.parametrize("name", ["forward", "method"])
def test_a_dict_given_to_what_takes_tensors_is_refused_with_the_key_to_name(name: str) -> None:
    module = Plain()
    with pytest.raises(UserError, match=r"dict with the keys label, image, id, .*inputs='image'") as caught:
        Answers(name)(module, "cars", BATCH)
    assert isinstance(caught.value.__cause__, (TypeError, AttributeError)) and "'cars'" in str(caught.value)
    found = Answers(name, inputs="image")(module, "cars", BATCH)
    torch.testing.assert_close(found.logits, module(IMAGES))
    assert found.labels is BATCH["label"]


def test_a_method_that_takes_the_whole_dict_needs_no_key() -> None:
    module = Plain()
    torch.testing.assert_close(Answers("whole")(module, "cars", BATCH).logits, module(IMAGES))


@pytest.mark.parametrize("batch", [(IMAGES, torch.tensor([0, 1, 1])), IMAGES])
def test_errors_of_other_batches_are_the_users_own(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"^mine$"):
        Answers("broken")(Plain(), "cars", batch)

"""Correctors by themselves: the worked example, identity at the start, where they act, what their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import clip_config, save_bert
from torch import Tensor, nn

from lightning_merge.errors import UserError
from lightning_merge.modules import Encoder
from lightning_merge.modules.blocks import correctable_blocks, find_blocks, token_mean
from lightning_merge.modules.corrected import CorrectionHooks, corrected_encoder
from lightning_merge.modules.correctors import FINAL, Corrector, Correctors, surgery_loss
from lightning_merge.objectives import Outputs


class Toy(nn.Module):
    """A residual model whose forward pass is written out below once more, by hand."""

    def __init__(self, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = tokens + 0.1 * block(tokens)
        return self.norm(tokens.mean(1))


def filled(correctors: Correctors, width: int, seed: int = 0) -> Correctors:
    """Give every corrector a width and an Up that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for task in correctors.tasks:
        for site in correctors.sites:
            corrector = correctors.of(task, site)
            corrector.begin(width, torch.device("cpu"))
            corrector.up.data = torch.randn(corrector.up.shape, generator=generator)
    return correctors


def language_model(name: str) -> tuple[nn.Module, dict[str, Tensor], int]:
    from transformers import BertConfig, BertModel, CLIPVisionModel, GPT2Config, GPT2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    tower: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])}
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "bert":
        return BertModel(BertConfig(vocab_size=20, num_hidden_layers=3, **tower)).eval(), ids | mask, 3
    if name == "gpt2":
        return GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=4, n_head=2)).eval(), ids | mask, 4
    if name == "vit":
        return ViTModel(ViTConfig(image_size=8, patch_size=4, num_hidden_layers=2, **tower)).eval(), pixels, 2
    return CLIPVisionModel(clip_config().vision_config).eval(), pixels, 1


# --- one corrector --------------------------------------------------------------------------------------------------


def test_worked_example() -> None:
    corrector = Corrector(3, rank=2)
    corrector.down.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    corrector.up.data = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
    z, target = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    assert corrector.bias(z).tolist() == [[0.0, 1.0, 0.0]]
    assert surgery_loss(Outputs("a", features=z), Outputs("a", features=target)).item() == pytest.approx(1 / 3)
    assert surgery_loss(Outputs("a", features=corrector(z)), Outputs("a", features=target)).item() == 0


def test_a_new_corrector_is_the_identity_and_can_learn() -> None:
    corrector = Corrector(5, rank=3)
    z = torch.randn(4, 7, 5)
    assert torch.equal(corrector(z), z)
    corrector(z).square().sum().backward()
    # Up is 0, so Down has no gradient yet; were Down 0 too, nothing would ever move
    assert corrector.up.grad is not None and bool(corrector.up.grad.abs().sum() > 0)
    assert bool((corrector.down.abs() <= 5**-0.5).all()) and float(corrector.down.detach().std()) > 0.1


def test_draws_are_seeded_and_leave_the_callers_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = Corrector(5, seed=3), Corrector(None, seed=3)
    second(torch.zeros(2, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.down, second.down) and not torch.equal(first.down, Corrector(5, seed=4).down)


def test_the_width_comes_with_the_first_features_and_the_optimizer_keeps_its_parameters() -> None:
    corrector = Corrector(None, rank=2)
    optimizer = torch.optim.Adam(corrector.parameters(), lr=0.1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.inference_mode():
        corrector(torch.randn(3, 4))
    corrector(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert held[0] is corrector.down and held[1] is corrector.up and bool(corrector.up.abs().sum() > 0)
    with pytest.raises(UserError, match=r"width 4 got features of shape \(3, 5\)"):
        corrector(torch.randn(3, 5))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_that_is_none_is_refused(rank: Any) -> None:
    with pytest.raises(UserError, match="rank must be an integer from 1"):
        Corrector(4, rank)


def test_low_precision_features_keep_their_dtype() -> None:
    corrector = Corrector(4, rank=2)
    assert corrector(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert corrector.down.dtype == torch.float32


def test_it_follows_its_features_to_their_device() -> None:
    corrector = Corrector(4, rank=2).requires_grad_(False)
    with torch.inference_mode():
        answer = corrector(torch.empty(2, 4, device="meta"))
    assert answer.device.type == "meta"
    for parameter in corrector.parameters():  # which may be trained further, elsewhere
        assert parameter.device.type == "meta" and not parameter.is_inference() and not parameter.requires_grad


# --- a set ----------------------------------------------------------------------------------------------------------


def test_no_two_tasks_or_sites_share_a_number() -> None:
    correctors = filled(Correctors(["a", "b"], ["blocks.0"], rank=2), 4)
    pointers = [p.data_ptr() for p in correctors.parameters()]
    assert len(set(pointers)) == len(pointers) == 2 * 2 * 2
    downs = {tuple(correctors.of(t, s).down.flatten().tolist()) for t in "ab" for s in correctors.sites}
    assert len(downs) == 4
    assert correctors.size() == 2 * correctors.size("a") == 2 * 2 * (2 * 2 * 4)


def test_sizes_of_the_papers() -> None:
    v1 = filled(Correctors(map(str, range(8)), rank=16), 512)
    assert v1.size() == 131_072
    v2 = Correctors(map(str, range(8)), [f"b.{i}" for i in range(12)], rank=16)
    for task in v2.tasks:
        for site in v2.sites:
            v2.of(task, site).begin(512 if site == FINAL else 768, torch.device("cpu"))
    assert v2.size() == 2_490_368 and v2.version == 2


def test_learned_and_restore_go_round_and_back_to_the_empty_start() -> None:
    correctors = Correctors(["a"], rank=2)
    empty = correctors.learned()
    z = torch.randn(3, 4)
    assert torch.equal(correctors(z, "a"), z) and correctors.drift() == 0
    correctors.of("a").up.data = torch.ones(4, 2)
    assert correctors.drift() > 0 and correctors.table()["a"][FINAL] == 1
    state, moved = correctors.learned(), correctors(z, "a")
    correctors.restore(empty)
    assert torch.equal(correctors(z, "a"), z)
    correctors.restore(state)
    assert torch.equal(correctors(z, "a"), moved)
    with pytest.raises(UserError, match="same tasks and sites"):
        Correctors(["b"], rank=2).restore(state)
    with pytest.raises(UserError, match="rank 3"):
        Correctors(["a"], rank=3).restore(state)


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "clip"])
def test_blocks_are_read_from_the_model(name: str) -> None:
    model, _, depth = language_model(name)
    blocks = find_blocks(model)
    assert len(blocks) == depth and len({type(model.get_submodule(block)) for block in blocks}) == 1


def test_a_longer_list_inside_a_block_is_not_taken_for_the_blocks() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(9))

    model = nn.Module()
    model.layers = nn.ModuleList(Mixture() for _ in range(3))
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))
    assert find_blocks(model) == ["layers.0", "layers.1", "layers.2"]
    assert len(find_blocks(model, "layers.1.experts")) == 9
    assert find_blocks(model, ["layers.[02]"]) == ["layers.0", "layers.2"]
    with pytest.raises(UserError, match=r"No block of Module is called 'layer'.*'layers' \(3\)"):
        find_blocks(model, "layer")


def test_two_towers_of_one_depth_are_refused_with_their_names() -> None:
    model = nn.Module()
    model.text, model.vision = Toy(), Toy()
    with pytest.raises(UserError, match=r"equally long lists of blocks: text\.blocks, vision\.blocks"):
        find_blocks(model)
    assert correctable_blocks(model, "text") == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(UserError, match="no list of blocks"):
        find_blocks(nn.Linear(2, 2))


# --- at work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "clip"])
def test_version_two_acts_after_every_block_and_on_the_features(name: str) -> None:
    model, inputs, depth = language_model(name)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **tensors: Tensor) -> Tensor:
            return self.model(**tensors).last_hidden_state[:, 0]

    pooled = Pooled()
    correctors = Correctors(["a", "b"], correctable_blocks(pooled, ""), rank=6)
    hooks = CorrectionHooks(pooled, "", correctors)
    plain = pooled(**inputs)
    with hooks.attached(), hooks.on("a"), hooks.recording() as record:
        assert torch.equal(pooled(**inputs), plain)  # new correctors change nothing
    assert len(record) == depth + 1 and all(features.shape == (2, 8) for features in record.values())
    assert correctors.trained_tasks == ("a",)
    for site in correctors.sites:  # each has its effect, and none on the other task
        corrector = correctors.of("a", site)
        corrector.up.data = torch.randn(corrector.up.shape)  # a constant shift would be lost in the next LayerNorm
        with hooks.attached(), hooks.on("a"):
            assert not torch.equal(pooled(**inputs), plain)
        with hooks.attached(), hooks.on("b"):
            assert torch.equal(pooled(**inputs), plain)
        corrector.up.data.zero_()
    assert torch.equal(pooled(**inputs), plain)


def test_what_was_kept_before_the_width_was_known_is_the_start() -> None:
    correctors = Correctors(["a", "b"], ["x"], rank=2, seed=3)
    kept = correctors.learned()
    optimizer = torch.optim.Adam(correctors.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        correctors(correctors(torch.randn(3, 4), "a", "x"), "a").square().sum().backward()
        optimizer.step()
    start = Correctors(["a", "b"], ["x"], rank=2, seed=3)
    start(start(torch.randn(3, 4), "a", "x"), "a")
    assert correctors.drift() > 0
    correctors.restore(kept)
    assert correctors.drift() == 0 and correctors.trained_tasks == ("a",)
    for name, values in correctors.learned().items():
        assert torch.equal(values, start.learned()[name])
    optimizer.step()  # the same parameters, of the same shapes


def test_a_corrected_pass_equals_one_written_by_hand() -> None:
    toy, tokens = Toy(), torch.randn(2, 5, 6)
    correctors = filled(Correctors(["a"], find_blocks(toy), rank=2), 6)
    hooks = CorrectionHooks(toy, "", correctors)
    with hooks.attached(), hooks.on("a"), hooks.recording() as record:
        found = toy(tokens)
    hidden = tokens
    for place, block in enumerate(toy.blocks):
        branch = correctors(block(hidden), "a", f"blocks.{place}")
        torch.testing.assert_close(record[f"blocks.{place}"], branch.mean(1))
        hidden = hidden + 0.1 * branch
    torch.testing.assert_close(found, correctors(toy.norm(hidden.mean(1)), "a"))
    torch.testing.assert_close(record[FINAL], found)


def test_block_outputs_may_be_tuples_and_masks_come_by_any_way() -> None:
    class Block(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
            self.seen = hidden
            return hidden * 2, "attention"

        inner = nn.Identity()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])
            for layer in self.layers:
                layer.add_module("part", nn.Identity())

        def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
            for layer in self.layers:
                hidden, rest = layer(hidden)
                assert rest == "attention"
            return hidden[:, 0]

    model, hidden = Model(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    hooks = CorrectionHooks(model, "", Correctors(["a"], find_blocks(model), rank=2))
    for arguments, named in (((hidden, mask), {}), ((hidden,), {"attention_mask": mask})):
        with hooks.attached(), hooks.on("a"), hooks.recording() as record:
            model(*arguments, **named)
        torch.testing.assert_close(record["layers.1"][1], 4 * hidden[1, 0])
        torch.testing.assert_close(record["layers.0"][0], 2 * hidden[0].mean(0))


def test_the_mean_token_does_not_depend_on_padding() -> None:
    tokens = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    padded = torch.cat([tokens, torch.full((2, 5, 3), 9.0)], 1)
    longer = torch.cat([mask, torch.zeros(2, 5, dtype=mask.dtype)], 1)
    torch.testing.assert_close(token_mean(tokens, mask), token_mean(padded, longer))
    torch.testing.assert_close(token_mean(tokens, mask)[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(token_mean(tokens), tokens.mean(1))


def test_the_loss_adds_the_blocks_and_holds_the_targets_still() -> None:
    z, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    blocks = {name: torch.randn(3, 2, requires_grad=True) for name in ("x", "y")}
    targets = {name: torch.randn(3, 2, requires_grad=True) for name in ("x", "y")}
    loss = surgery_loss(Outputs("a", features=z, extra=blocks), Outputs("a", features=target, extra=targets))
    by_hand = (z - target).abs().mean() + sum((blocks[n] - targets[n]).abs().mean() for n in ("x", "y"))
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert z.grad is not None and target.grad is None and targets["x"].grad is None and blocks["y"].grad is not None


# --- files and encoders ---------------------------------------------------------------------------------------------


def test_files_answer_equally_and_say_what_they_are(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_bert(tmp_path / "bert"))
    correctors = filled(Correctors(["good/bad", "v1.2"], correctable_blocks(encoder, ""), rank=3, seed=5), 16)
    tensors = encoder.preprocess(["the film is good", "bad"])
    correctors.save(tmp_path)
    loaded = Correctors.load(tmp_path / "surgery.safetensors")
    for task in correctors.tasks:
        expected = corrected_encoder(encoder, correctors, task)(**tensors)
        assert torch.equal(corrected_encoder(encoder, loaded, task)(**tensors), expected)
        assert not torch.allclose(expected, encoder(**tensors))
    with safe_open(tmp_path / "surgery.safetensors", framework="pt") as file:
        facts = file.metadata()
        assert (facts["version"], facts["rank"], facts["widths"]) == ("2", "3", "[16, 16, 16]")
        assert "good/bad" in facts["tasks"] and "layer.1" in facts["sites"]
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_corrected_encoder_stands_where_an_encoder_stands(tmp_path: Path) -> None:
    encoder = Encoder.from_pretrained(save_bert(tmp_path / "bert"))
    correctors = filled(Correctors(["a"], rank=2), 16)
    corrected = corrected_encoder(encoder, correctors, "a")
    assert (corrected.dim, corrected.kind, corrected.pooling) == (16, "text", "mean")
    tensors = corrected.preprocess(["very good"])
    torch.testing.assert_close(corrected(**tensors), correctors(encoder(**tensors), "a"))
    cls = encoder.reconfigured("cls")
    torch.testing.assert_close(corrected.reconfigured("cls")(**tensors), correctors(cls(**tensors), "a"))
    with pytest.raises(UserError, match=r"Unknown task of a corrector 'b'\. Known: a"):
        corrected_encoder(encoder, correctors, "b")
    with pytest.raises(UserError, match=r"features of size 8, the encoder gives 16"):
        corrected_encoder(encoder, filled(Correctors(["a"], rank=2), 8), "a")
    with pytest.raises(UserError, match=r"act after 'layers\.0'"):
        corrected_encoder(encoder, Correctors(["a"], ["layers.0"]), "a")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="do not exist"):
        Correctors.load(tmp_path)
    (tmp_path / "surgery.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Correctors.load(tmp_path)
    correctors = filled(Correctors(["a"], rank=2), 4)
    facts = {"tasks": '["a"]', "sites": '["features"]', "widths": "[4]", "rank": "2"}
    for values in (torch.full((2, 4), float("nan")), torch.zeros(2, 5)):
        tensors = correctors.learned() | {"a/features/down": values}
        save_file(tensors, tmp_path / "surgery.safetensors", facts)
        with pytest.raises(UserError, match=r"'a/features/down' must be finite and of shape \(2, 4\)"):
            Correctors.load(tmp_path)
    with pytest.raises(UserError, match="nothing to save"):
        Correctors(["a"]).save(tmp_path)

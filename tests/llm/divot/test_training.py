"""The objective, the trainable, and a small model that learns to read and to write."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.llm.divot.conftest import TOKENS, WIDTH, tiny
from torch import Tensor

from kinetok.llm.cost import training_cost
from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.generation import Decoding, complete, make_clips
from kinetok.llm.divot.heads import GMMConfig
from kinetok.llm.divot.language import LoRAConfig
from kinetok.llm.divot.model import DivotLM
from kinetok.llm.divot.sequences import Packed, ask_caption, ask_clip, depict, describe
from kinetok.llm.divot.training import PLAYER, TASK, DivotLMObjective, DivotLMTrainable
from kinetok.llm.divot.vocabulary import Vocabulary

Clips = Callable[[int], Tensor]


def _mixed(vocabulary: Vocabulary, clips: Clips) -> list[Packed]:
    return [describe(vocabulary, clips(1), "ab", limit=200), depict(vocabulary, "a longer one", clips(1), limit=200)]


def test_loss_is_the_weighted_sum_of_both(clips: Clips) -> None:
    trainable = DivotLMTrainable(tiny(), DivotLMObjective(text=0.5, head=2.0))
    loss, figures = trainable.players[PLAYER](collate(_mixed(trainable.model.vocabulary, clips), [1, 2]), 1)
    torch.testing.assert_close(loss, 0.5 * figures["lm_loss"] + 2 * figures["head_loss"])
    assert figures["writing"] == 0.5


def test_figures_of_samples_add_up_to_those_of_the_batch_and_of_each_task(clips: Clips) -> None:
    """The end of a clip's sample is no part of a perplexity; a task that is not there has no figures."""
    trainable = DivotLMTrainable(tiny(), DivotLMObjective(), tasks=("captioning", "generation", "answering"))
    packed = _mixed(trainable.model.vocabulary, clips)
    batch = collate(packed, [1, 2]) | {TASK: torch.tensor([0, 1])}
    (_, read), (_, made) = (trainable.players[PLAYER](collate([sample], [seed]), 1) for sample, seed in zip(packed, (1, 2), strict=True))
    samples = trainable.evaluate(batch)
    assert all(values.shape == (2,) for values in samples.values())
    torch.testing.assert_close(samples["lm_loss"], torch.stack([read["lm_loss"], made["lm_loss"]]))
    assert samples["lm_labels"].tolist() == [3, 0] and samples["writing"].tolist() == [0, 1]
    told = trainable.conclude({name: values.mean().item() for name, values in samples.items()})
    perplexity, head = read["lm_loss"].exp().item(), made["head_loss"].item()
    expected = {"perplexity": perplexity, "head_loss": head, "captioning/perplexity": perplexity, "generation/head_loss": head}
    assert told == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("frozen", ["from_tokens", "to_head"])
def test_a_frozen_projection_takes_no_gradient(clips: Clips, frozen: str) -> None:
    trainable = DivotLMTrainable(tiny(), DivotLMObjective.model_validate({"frozen": frozen, "lora": LoRAConfig(rank=2)}))
    player = trainable.players[PLAYER]
    loss, _ = player(collate(_mixed(trainable.model.vocabulary, clips), [1, 2]), 1)
    trained = {name: parameter for name, parameter in player.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    assert len(gradients) == len(trained) and not any(frozen in name for name in trained)


def test_checkpointing_changes_no_number(clips: Clips) -> None:
    plain, saving = (DivotLMTrainable(tiny(), DivotLMObjective(), checkpointing=flag) for flag in (False, True))
    batch = collate(_mixed(plain.model.vocabulary, clips), [1, 2])
    gradients = []
    for trainable in (plain, saving):
        player = trainable.players[PLAYER].train()
        loss, _ = player(batch, 1)
        gradients.append(torch.autograd.grad(loss, list(player.parameters())))
    assert saving.model.llm.is_activation_checkpointing
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_cost_counts_what_adapters_leave_frozen(clips: Clips, vocabulary: Vocabulary) -> None:
    def build() -> DivotLMTrainable:
        return DivotLMTrainable(tiny(), DivotLMObjective(lora=LoRAConfig(rank=2, dropout=0.0)))

    player = build().players[PLAYER]
    learned = sum(parameter.numel() for parameter in player.parameters() if parameter.requires_grad)
    cost = training_cost(build, collate(_mixed(vocabulary, clips), [1, 2]))
    assert cost.trained == learned and cost.trained + cost.frozen == sum(parameter.numel() for parameter in player.parameters())


def test_export_merges_adapters(clips: Clips, tmp_path: Path) -> None:
    trainable = DivotLMTrainable(tiny(), DivotLMObjective(lora=LoRAConfig(rank=2)))
    for name, parameter in trainable.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainable.export(tmp_path)
    read, batch = DivotLM.from_pretrained(tmp_path), collate(_mixed(trainable.model.vocabulary, clips), [1, 2])
    trainable.model.eval()
    torch.testing.assert_close(read(batch).text_BM, trainable.model(batch).text_BM, atol=1e-5, rtol=1e-5)
    again = DivotLMTrainable(read, DivotLMObjective(lora=LoRAConfig(rank=2)))
    torch.testing.assert_close(again.model.eval()(batch).text_BM, trainable.model(batch).text_BM, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mechanism", ["bidirectional", "autoregressive"])
def test_a_small_model_learns_to_read_and_to_write(mechanism: str) -> None:
    """Two captions with their clips: asked for one it makes that clip, shown a clip it names it."""
    model = tiny(mechanism=mechanism, head=GMMConfig(components=2, floor=0.01))
    vocabulary, names = model.vocabulary, ["red", "blue"]
    clips_CND = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    samples = [
        sample
        for name, clip_ND in zip(names, clips_CND, strict=True)
        for sample in (depict(vocabulary, name, clip_ND[None], limit=90), describe(vocabulary, clip_ND[None], name, limit=90))
    ]
    player, batch = DivotLMTrainable(model, DivotLMObjective()).players[PLAYER], collate(samples, range(4))
    optimizer = torch.optim.AdamW(player.parameters(), lr=5e-3)
    for step in range(100):
        optimizer.zero_grad()
        player(batch, step)[0].backward()
        torch.nn.utils.clip_grad_norm_(player.parameters(), 1.0)
        optimizer.step()
    model.eval()
    made_BND = make_clips(model, [ask_clip(vocabulary, name, instructed=False) for name in names], [5, 6])
    error = (made_BND[:, None] - clips_CND).square().mean((2, 3))
    assert error.diagonal().max() < 0.3 and min(error[0, 1], error[1, 0]) > 1
    assert complete(model, [ask_caption(vocabulary, clip_ND[None]) for clip_ND in clips_CND], [0, 0], Decoding(temperature=0)) == names

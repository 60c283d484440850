"""Settings under [training] that only fail when the Trainer is built or makes a step."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from world import World

from kr2cache.errors import ConfigError
from kr2cache.experiment.rehearsal import rehearse
from kr2cache.system import hub
from kr2cache.training.kreader import KReader
from kr2cache.training.trainer import ReaderTrainer

BAD: list[tuple[dict[str, Any], str]] = [
    ({"dataloader_drop_last": True}, "dataloader_drop_last = True: 3 training examples do not fill one batch of 4"),
    ({"report_to": "wandb"}, "report_to = 'wandb': .*requires wandb to be installed"),
    ({"report_to": "nosuch"}, "report_to = 'nosuch'"),
    ({"optim": "adamw_bnb_8bit"}, "optim = 'adamw_bnb_8bit': .*bitsandbytes"),
    ({"optim": "galore_adamw"}, "optim = 'galore_adamw': .*galore"),
    ({"use_liger_kernel": True}, "use_liger_kernel = True: .*liger-kernel"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type = 'cosine_with_min_lr': .*min_lr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type = .*num_decay_steps"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0"),
    ({"weight_decay": "x"}, "weight_decay = 'x'"),
    ({"adam_beta1": 2.0}, "adam_beta1 = 2.0: Invalid beta"),
    ({"max_grad_norm": "a"}, "max_grad_norm = 'a'"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers = -1"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers = True: .*num_workers"),
    ({"save_strategy": "best"}, "save_strategy = 'best': .*metric_for_best_model"),
    ({"accelerator_config": "nofile.json"}, "accelerator_config = 'nofile.json': .*No such file"),
    # Two that do not work; one that does not work with two that do; two that do not work together.
    ({"optim": "lomo", "report_to": "wandb"}, "optim = 'lomo': .*; report_to = 'wandb': "),
    ({"warmup_steps": 1, "adam_beta2": 2.0, "bf16": True}, r"not work\. adam_beta2 = 2.0: [^;]*$"),
    (
        {"weight_decay": 0.1, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"nosuch": 1}},
        "lr_scheduler_kwargs = {'nosuch': 1}: .*nosuch",
    ),
]


@pytest.mark.parametrize(("training", "message"), BAD, ids=[" ".join(training) for training, _ in BAD])
def test_settings_that_do_not_work_are_named(world: World, training: dict[str, Any], message: str) -> None:
    package = str(training.get("report_to"))
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(ConfigError, match=message) as caught:
        rehearse(world.config(training=training), 3)
    assert "[training] in kr2cache.toml" in caught.value.message
    assert "leave them out" in caught.value.remedy


def test_they_are_named_before_anything_is_made(world: World) -> None:
    with pytest.raises(ConfigError, match="dataloader_drop_last = True: 12 training examples"):
        world.train(batch_size=64, training={"dataloader_drop_last": True})
    assert not world.caches.exists()
    assert not (world.folder / "runs").exists()


def test_settings_that_work_pass_and_leave_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.folder)
    before = sorted(world.folder.rglob("*"))
    settings: dict[str, Any] = {
        "bf16": True,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "epoch",
    }
    settings |= {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1, "torch_compile": True}
    settings |= {"activation_checkpointing": True, "train_sampling_strategy": "group_by_length"}
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda *given, **named: compiled.append(given))
    rehearse(world.config(training=settings), 12)
    assert compiled == [], "it takes too long"
    assert sorted(world.folder.rglob("*")) == before


def test_neftune_puts_noise_on_the_readers_embeddings(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    compute_loss = ReaderTrainer.compute_loss  # by then the Trainer has put the reader into training mode

    def watched(trainer: ReaderTrainer, reader: KReader, *given: Any, **named: Any) -> Any:
        if reader.model.config.model_type == "xlm-roberta":
            numbers = torch.tensor([[5, 6]])
            plain = torch.nn.functional.embedding(numbers, reader.get_input_embeddings().weight)
            seen.append((reader.get_input_embeddings()(numbers) - plain).abs().max().detach())
        return compute_loss(trainer, reader, *given, **named)

    monkeypatch.setattr(ReaderTrainer, "compute_loss", watched)
    world.train(method="kreader", epochs=1.0, training={"neftune_noise_alpha": 5.0})
    assert seen
    # NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise of at most alpha / sqrt(length * width).
    assert all(0 < float(noise) <= 5 / (2 * 24) ** 0.5 for noise in seen)


def test_a_hub_that_cannot_be_reached_is_found_before_anything_is_made(world: World) -> None:
    with pytest.raises(ConfigError, match=r"push_to_hub .* cannot be reached: HF_HUB_OFFLINE is set\."):
        world.train(training={"push_to_hub": True})
    assert not list(world.folder.rglob("*.h5"))


def test_a_setting_that_is_not_rehearsed_is_explained_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    with pytest.raises(ConfigError, match=r"before the end of its first step.*offline") as caught:
        world.train(method="kreader", training={"push_to_hub": True})
    assert "(push_to_hub)" in caught.value.remedy

    def fails(*given: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    step = ReaderTrainer.training_step
    monkeypatch.setattr(
        ReaderTrainer,
        "training_step",
        lambda self, model, *given: (step if model.model.config.model_type == "bert" else fails)(self, model, *given),
    )
    with pytest.raises(ConfigError, match="before the end of its first step: no such kernel"):
        world.train(method="kreader", training={"warmup_steps": 1})
    with pytest.raises(RuntimeError, match="no such kernel"):  # no setting can be the cause
        world.train(method="kreader")

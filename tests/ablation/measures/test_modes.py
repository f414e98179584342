import copy

import pytest
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from rankflow.ablation.measures.modes import evaluating, without_trainer_precision


def test_every_module_gets_its_own_mode_back_even_after_an_error():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.fixture
def trained_in_bf16(tmp_path, transformer):
    model = transformer()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    row = {"input_ids": [3, 4], "attention_mask": [1, 1], "labels": [1, 1]}
    if "Classification" in type(model).__name__:
        row["labels"] = 1
    trainer = Trainer(model=model, args=args, train_dataset=[row] * 4)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def test_a_forward_is_free_of_its_trainers_precision_for_a_while(trained_in_bf16):
    model, tokens = trained_in_bf16.eval(), torch.tensor([[3, 4, 5]])
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = fresh(input_ids=tokens).logits
        rough = model(input_ids=tokens).logits
        assert not torch.allclose(rough, expected, rtol=1e-5)
        with without_trainer_precision(model):
            copied = copy.deepcopy(model)
            torch.testing.assert_close(model(input_ids=tokens).logits, expected)
            assert isinstance(model(input_ids=tokens, return_dict=False), tuple)
        torch.testing.assert_close(copied(input_ids=tokens).logits, expected)
        assert torch.equal(model(input_ids=tokens).logits, rough)


def test_a_model_that_no_trainer_has_seen_stays_as_it_is():
    model = nn.Linear(2, 2)
    with without_trainer_precision(model):
        assert "forward" not in vars(model)
    assert "forward" not in vars(model)

"""APEX inside TRL's SFTTrainer."""

import pytest
from datasets import Dataset
from tiny_runs import words

from graftlm.apex_config import ApexConfig
from graftlm.models import load_model
from graftlm.tiny import build_tiny_tokenizer
from graftlm.training.trainer import ApexMixin, ApexSFTTrainer


def conversations(count: int = 24) -> Dataset:
    rows = [
        {"messages": [{"role": "user", "content": words(3, i)}, {"role": "assistant", "content": words(5, -i)}]}
        for i in range(count)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"padding_free": True, "max_length": None}],
    ids=["padded", "packed", "padding-free"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_learns_and_counts_conversations(changes, tmp_path):
    from trl import SFTConfig

    config = SFTConfig(
        output_dir=str(tmp_path),
        **{"max_length": 128, **changes},
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        assistant_only_loss=True,
        bf16=False,
        activation_checkpointing=False,  # TRL's default goes by a name that transformers has deprecated
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = ApexSFTTrainer(
        model=load_model("tiny-llama"),
        processing_class=build_tiny_tokenizer(),
        args=config,
        train_dataset=conversations(),
        apex=ApexConfig(stages=2, k_heads=0.5, assess_samples=6),
    )
    assert issubclass(ApexSFTTrainer, ApexMixin)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    assert trainer.apex.clock.starts == [0, 4]
    seen = trainer.apex.recorder.samples["layer0_heads"]  # conversations in the last 4 steps
    assert seen > 16 if "packing" in changes else seen == 16
    assert trainer.apex.operator_parameters > 0

"""APEX in TRL: ApexSFTTrainer takes SFTTrainer's place, with one more argument. Run it: python examples/trl_sft.py"""

from datasets import Dataset
from trl import SFTConfig

from graftlm.apex_config import ApexConfig
from graftlm.models import load_model, load_tokenizer
from graftlm.training.trainer import ApexSFTTrainer

rows = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"{a} + {b} is {a + b}."},
        ]
    }
    for a in range(16)
    for b in range(16)
]

trainer = ApexSFTTrainer(
    model=load_model("tiny-llama"),
    processing_class=load_tokenizer("tiny-llama"),
    args=SFTConfig(
        output_dir="runs/trl_sft",
        max_length=128,
        max_steps=30,
        learning_rate=1e-3,
        logging_steps=5,
        assistant_only_loss=True,
        report_to="none",
        use_cpu=True,  # a tiny model; leave it out to train on a GPU
        activation_checkpointing=False,
    ),
    train_dataset=Dataset.from_list(rows),
    apex=ApexConfig(stages=2, assess_samples=16),
)
trainer.train()
trainer.save_model()

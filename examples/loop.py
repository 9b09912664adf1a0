"""APEX in a PyTorch loop of your own: the five lines marked `# APEX`. Run it: python examples/loop.py"""

from pathlib import Path

import torch

from graftlm.apex import Apex
from graftlm.apex_config import ApexConfig
from graftlm.models import load_model, load_tokenizer

STEPS, BATCH, LENGTH = 60, 8, 64

torch.manual_seed(0)
model = load_model("tiny-llama").train()
tokenizer = load_tokenizer("tiny-llama")

folder = Path(__file__).parents[1] / "src"
text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))
tokens = torch.tensor(tokenizer(text)["input_ids"])
blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)  # [N, LENGTH]
batches = [{"input_ids": rows, "labels": rows} for rows in blocks.split(BATCH) if len(rows) == BATCH]

apex = Apex(model, ApexConfig(stages=3), total_steps=STEPS)  # APEX: before the optimizer, which gets its operators
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
apex.start(optimizer, assess_on=batches[:4])  # APEX: rank, choose the first stage's sets

for step in range(STEPS):
    loss = model(**batches[step % len(batches)]).loss
    loss.backward()
    apex.pull_back()  # APEX: from the model's gradients to those of the raw weights and operators
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    apex.advance()  # APEX: at a stage's end, fuse and choose anew
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3d}  loss {loss.item():.3f}")

apex.finish()  # APEX: what is left is a plain model of the same architecture and size
model.save_pretrained("runs/loop")
print("saved to runs/loop; it opens with AutoModelForCausalLM.from_pretrained('runs/loop')")

"""The export is an ordinary Hugging Face folder: load it with nothing but transformers, and ask it.

python examples/sms-spam/reload.py runs/sms-spam/export
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

for message in (
    "Are we still on for lunch tomorrow? Running a bit late",
    "WINNER!! Claim your free 1000 cash prize now, call 09061701461",
):
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, max_new_tokens=4)[0, asked["input_ids"].shape[1] :]
    print(f"{message!r} → {tokenizer.decode(answer, skip_special_tokens=True).strip()}")

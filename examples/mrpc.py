"""The paper's experiment on MRPC: BERT-base teaches DistilBERT, with the control that the paper lacks.

    python examples/mrpc.py [OUT]

On a GPU this takes some minutes, on two CPU cores some hours: `kdlora run configs/mrpc.yaml --dry-run` estimates it.
"""

import sys

from kdlora import build_config, live_progress, run_experiment

config = build_config(
    {
        "recipe": "paper",
        "family": "bert",
        "task": {"name": "mrpc"},
        "data": {"path": "nyu-mll/glue"},
        "teacher": {"train": {"epochs": 3, "learning_rate": 2e-5}},
        "student": {"train": {"epochs": 5, "learning_rate": 5e-4}},
        "distil": {"alpha": 0.5, "temperature": 2.0},
        "run": {"arms": ["fft", "lora", "kd-lora", "student-lora"], "seeds": [0, 1, 2]},
    }
)
with live_progress() as listen:
    result = run_experiment(config, sys.argv[1] if len(sys.argv) > 1 else "runs/mrpc", listen=listen)

for record in result.records:
    print(f"{record.arm:>14}  seed {record.seed}  {record.status}  {record.score}")
print(f"report: {result.layout.report_html}")

"""A plain transformers script that distils. What a script with `Trainer` lacks is marked 1 to 5."""

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
)

# 1. the trainer, and what reads the teacher
from kdlora import DistilConfig, DistillationTrainer, Task, load_fine_tuned, teacher_logits

TEACHER = "distilbert-base-uncased-finetuned-sst-2-english"
STUDENT = "sentence-transformers/paraphrase-MiniLM-L3-v2"

rows = load_dataset("nyu-mll/glue", "sst2")
rows = rows.rename_columns({"idx": "id", "sentence": "text"})
train = rows["train"].select(range(min(2000, len(rows["train"]))))

# 2. the labels in your order; the teacher's are matched by name
task = Task("single-label", ("text",), ("label",), ("negative", "positive"), ("accuracy",))
teacher, columns = load_fine_tuned(TEACHER, task)
# 3. the teacher reads once, and its outputs stay on disk
logits = teacher_logits(teacher, columns, train, task, "teacher-logits", max_length=64)
# 4. a column `teacher_logits`, by id, never by position
train = logits.attach(train)

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
model = AutoModelForSequenceClassification.from_pretrained(STUDENT, id2label=task.id2label, label2id=task.label2id)


def encode(batch):
    """Turn texts into token ids."""
    return tokenizer(batch["text"], truncation=True, max_length=64)


def accuracy(answers):
    """Count what is right."""
    return {"accuracy": float((answers.predictions.argmax(axis=1) == answers.label_ids).mean())}


# 5. in place of Trainer, with the weights of the two losses
trainer = DistillationTrainer(
    model,
    TrainingArguments(
        output_dir="trained",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        eval_strategy="epoch",
        report_to="none",
    ),
    distil=DistilConfig(alpha=0.5, temperature=2.0),
    train_dataset=train.map(encode, batched=True),
    eval_dataset=rows["validation"].map(encode, batched=True),
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model("trained/student")

"""A plain transformers script that distils. What a script with `Trainer` lacks is marked 1 to 5."""

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from kdlora import DistilConfig, DistillationTrainer, Task, load_fine_tuned, teacher_logits  # 1

STUDENT = "sentence-transformers/paraphrase-MiniLM-L3-v2"

rows = load_dataset("nyu-mll/glue", "sst2").rename_columns({"idx": "id", "sentence": "text"})
train, validation = rows["train"].select(range(min(2000, len(rows["train"])))), rows["validation"]

task = Task("single-label", ("text",), ("label",), ("negative", "positive"), ("accuracy",))  # 2: labels in your order
teacher, columns = load_fine_tuned("distilbert-base-uncased-finetuned-sst-2-english", task)  # 3: matched by name
logits = teacher_logits(teacher, columns, train, task, "teacher-logits", max_length=64)  # 4: read once, kept on disk

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
model = AutoModelForSequenceClassification.from_pretrained(STUDENT, num_labels=2)
encoded = {
    name: part.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)
    for name, part in (("train", logits.attach(train)), ("validation", validation))  # by id, never by position
}


def accuracy(answers):
    """Count what is right."""
    return {"accuracy": float((answers.predictions.argmax(axis=1) == answers.label_ids).mean())}


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
    distil=DistilConfig(alpha=0.5, temperature=2.0),  # 5
    train_dataset=encoded["train"],
    eval_dataset=encoded["validation"],
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
)
trainer.train()
print(trainer.evaluate())
trainer.save_model("trained/student")

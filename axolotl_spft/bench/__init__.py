"""Time and memory of sparse fine-tuning beside LoRA's family, SHiRA, full fine-tuning and the limit."""

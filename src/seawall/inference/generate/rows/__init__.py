"""Many sequences in one step: a row of the batch for each, their memory, and the prompts that they share."""
